"""What the tests of top-k and of several targets share: inputs, and comparison with float64."""

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.testing import assert_close, cast, make_pair, single
from tests.helpers.kernel_cases import move

NAMES = ("logprob", "ids", "lse")


def random_case(tokens: int, hidden: int, vocab: int, seed: int = 0) -> dict[str, Tensor]:
    case = single(make_pair(tokens, hidden, vocab, masked=tokens // 8, seed=seed))
    case["shift_labels"] = case.pop("target")
    return case


def integer_case(tokens: int, hidden: int, vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """Logits are small integers, exact in any dtype, so most are equal to others; some are -inf."""
    g = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).double()

    bias = integers(vocab)
    bias[torch.randperm(vocab, generator=g)[: vocab // 4]] = -torch.inf
    return {"input": integers(tokens, hidden), "weight": integers(vocab, hidden), "bias": bias}


def distinct_ids(tokens: int, vocab: int, count: int, ignored: int = 0, seed: int = 0) -> Tensor:
    """(tokens, count) distinct ids; the last `ignored` of every third token are -100."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:count] for _ in range(tokens)])
    ids[::3, count - ignored :] = -100
    return ids


def targets_case(
    count: int, tokens: int, hidden: int, vocab: int, ignored: int = 1
) -> dict[str, Tensor]:
    """Arguments of `fused_linear_logprob` with `count` targets per token."""
    case = single(make_pair(tokens, hidden, vocab))
    case["target"] = distinct_ids(tokens, vocab, count, ignored)
    case["target"][tokens // 2] = -100  # a token without targets reaches no product
    return case


def check(
    case: dict[str, Tensor],
    k: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    only_ours: dict[str, object] | None = None,
    near: float = 1e-5,
    **options: object,
) -> None:
    """Error against float64 at most twice that of PyTorch in fp32; ids as a stable sort has them.

    Of two of the truth's logits that are less than `near` apart either may come first.
    """
    there = move(cast(case, dtype), device)
    found = fused_linear_topk(**there, k=k, **options, **(only_ours or {}))
    exact = cast(cast(case, dtype), torch.float64)
    true = reference.linear_topk(**exact, k=k, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = reference.linear_topk(**cast(exact, wide), k=k, **options)
    ours = [x.cpu() for x in found]
    assert ours[0].dtype == ours[2].dtype == wide and ours[1].dtype == torch.int64
    for name, a, t, p in zip(NAMES, ours, true, plain, strict=True):
        if name == "ids":
            assert_ids(a, t, exact, near, options)
        else:
            assert_close(a, t, p, max_factor=4.0, name=name)


def assert_ids(
    ids: Tensor,
    true: Tensor,
    exact: dict[str, Tensor],
    near: float,
    options: dict[str, object],
) -> None:
    assert ids.shape == true.shape
    names = ("softcap", "logit_scale", "temperature")
    how = {name: options[name] for name in names if name in options}
    z = reference.logits(exact["input"], exact["weight"], exact.get("bias"), **how)
    kept = true[..., 0] != options.get("ignore_index", -100)
    assert torch.equal(ids[~kept], true[~kept])
    ids, true, z = ids[kept], true[kept], z[kept]
    in_order = ids.sort(-1).values
    assert (in_order[..., 1:] > in_order[..., :-1]).all(), "an id comes twice"
    other, same = z.gather(-1, ids), z.gather(-1, true)
    wrong = (ids != true) & ~((other - same).abs() < near) | (ids != true) & (other == same)
    assert not wrong.any(), f"ids {ids[wrong]}, truth {true[wrong]}"


# -------------------------------------------------------------------------- shards of a vocabulary

# All but two, so that nearly all banned entries are among them.
SHARDED = {"k": 99, "ignore_index": 3, "temperature": 0.7}


def sharded_case(vocab: int) -> dict[str, Tensor]:
    case = integer_case(13, 8, vocab)
    case["weight"][0] += 0.125  # not all logits are equal to others
    return {**case, "shift_labels": torch.arange(13) % 5}


def shard_topk(
    rank: int, sizes: tuple[int, ...], group: dist.ProcessGroup, dtype: torch.dtype, **how: object
) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank finds that holds `sizes[rank]` rows of the head; k may exceed them."""
    case, first = sharded_case(sum(sizes)), sum(sizes[:rank])
    for name in ("weight", "bias"):
        case[name] = case[name][first : first + sizes[rank]].clone()
    return fused_linear_topk(**cast(case, dtype), **SHARDED, **how, process_group=group)


def compare_topk(ranks: list[tuple[Tensor, Tensor, Tensor]], sizes: tuple[int, ...]) -> None:
    """Each rank has the same, and what the whole vocabulary has."""
    case = sharded_case(sum(sizes))
    true = reference.linear_topk(**case, **SHARDED)
    plain = reference.linear_topk(**cast(case, torch.float32), **SHARDED)
    for found in ranks:
        assert all(torch.equal(a, b) for a, b in zip(found, ranks[0], strict=True))
    assert torch.equal(ranks[0][1], true[1])
    for i in (0, 2):
        assert_close(ranks[0][i], true[i], plain[i], max_factor=4.0, name=NAMES[i])
