"""Several targets per token: log-probabilities and gradients against float64 on full logits."""

import re

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import assert_close, make_pair, random_upstream, single
from tests.helpers.kernel_cases import SINGLE, check, run, same_bits, workspace_for
from tests.helpers.topk_cases import distinct_ids, targets_case

FROZEN, TRAINED = SINGLE[:1], SINGLE
N, D, V = 29, 19, 101
KINDS = [1, 3, 64, V]


def inputs(
    count: int, tokens: int = N, hidden: int = D, vocab: int = V, ignored: int = 1
) -> dict[str, Tensor]:
    return targets_case(count, tokens, hidden, vocab, ignored)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrt", [(), FROZEN, SINGLE[1:2], SINGLE[2:], TRAINED], ids="+".join)
@pytest.mark.parametrize("count", KINDS)
def test_values_and_gradients(count: int, wrt: tuple[str, ...], dtype: torch.dtype) -> None:
    options = {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.5}
    upstream = [random_upstream((N, count))]
    check(
        fused_linear_logprob, reference.linear_logprob, inputs(count), wrt, dtype=dtype,
        upstream=upstream if wrt else None, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tiles(dtype: torch.dtype) -> None:
    """The logits are read from tiles of 64 rows and 128 columns, by chunks of 1,024 columns."""
    case = cast16(inputs(37, 200, 24, 2500, ignored=5), dtype)
    target, kept = case["target"], case["target"] >= 0
    found = fused_linear_logprob(**case, temperature=0.7)
    z = case["input"].double() @ case["weight"].double().t() + case["bias"].double()
    true = (z / 0.7).log_softmax(-1).gather(-1, target.clamp(0))
    torch.testing.assert_close(found[kept].double(), true[kept], rtol=0.0, atol=2e-5)
    assert not found[~kept].any()


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_every_place(wrt: tuple[str, ...], count: int, place: tuple[str, str]) -> None:
    device, schedule = place
    case = inputs(count, 7, 16, 150)
    options = {"temperature": 1.3, "softcap": 6.0, "upstream": [random_upstream((7, count))]}
    ours = {"schedule": schedule}
    check(
        fused_linear_logprob, reference.linear_logprob, case, wrt, device=device,
        only_ours=ours, max_factor=4.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_tiled(wrt: tuple[str, ...], triton_device: str) -> None:
    case = inputs(5, 6, 16, 1300)
    check(
        fused_linear_logprob, reference.linear_logprob, case, wrt, device=triton_device,
        only_ours={"schedule": "tiled"}, max_factor=4.0, upstream=[random_upstream((6, 5))],
    )  # fmt: skip


@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
@pytest.mark.parametrize("schedule", ["blocked", "streaming"])
def test_float16_of_triton(schedule: str, wrt: tuple[str, ...], triton_device: str) -> None:
    """Its kernels store 16-bit gradients in a scale of their own."""
    case = inputs(5, 7, 16, 150)
    check(
        fused_linear_logprob, reference.linear_logprob, case, wrt, dtype=torch.float16,
        device=triton_device, only_ours={"schedule": schedule}, temperature=1.3, max_factor=4.0,
        upstream=[random_upstream((7, 5))],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.usefixtures("cpu_backend")
def test_16_bits(scale: float, wrt: tuple[str, ...], dtype: torch.dtype) -> None:
    """Also with an upstream gradient of a mean, which underflows in float16 by itself."""
    if scale != 1.0 and dtype == torch.bfloat16:
        pytest.skip("bfloat16 has fp32's range")
    case, upstream = inputs(8), [random_upstream((N, 8))]
    made = run(fused_linear_logprob, cast16(case, dtype), wrt, [upstream[0] * scale])
    true = run(reference.linear_logprob, cast16(case, dtype, torch.float64), wrt, upstream)
    plain = run(reference.linear_logprob, cast16(case, dtype), wrt, upstream)
    assert_close(made[0][0], true[0][0], plain[0][0], name="value")
    for name in wrt:
        found = made[1][name].double() / scale
        error = (2.0**-14 if scale != 1.0 else 0.0) * 600 * true[1][name].abs().max().item()
        assert_close(found, true[1][name], plain[1][name], floor=2e-3, atol=error, name=name)


def cast16(
    case: dict[str, Tensor], dtype: torch.dtype, then: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Rounded to `dtype`, in the dtype `then`."""
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.items()}
    return {k: v.to(then) if then and v.is_floating_point() else v for k, v in rounded.items()}


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_near_certain_targets_do_not_cancel(wrt: tuple[str, ...], dtype: torch.dtype) -> None:
    """Where a target has nearly all the mass, g and -mass s differ in their last digits."""
    case = single(make_pair(24, 101, 101, kind="onehot", std=5.0, masked=3))
    label = case["target"].clamp(min=0)
    case["target"] = torch.stack([label, (label + 7) % 101, (label + 50) % 101], 1)
    upstream = [torch.tensor([1.0, 0.0, 0.0]).expand(24, 3).double()]
    check(fused_linear_logprob, reference.linear_logprob, case, wrt, dtype=dtype, upstream=upstream)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_lse_and_statistics(wrt: tuple[str, ...]) -> None:
    case = inputs(4)
    kept = (case["target"] != -100).any(-1)

    def ours(**arguments: Tensor) -> tuple[Tensor, ...]:
        return fused_linear_logprob(**arguments, return_lse=True)

    def truth(**arguments: Tensor) -> tuple[Tensor, ...]:
        z = reference.logits(arguments["input"], arguments["weight"], arguments["bias"])
        return reference.linear_logprob(**arguments), torch.where(kept, z.logsumexp(-1), 0.0)

    check(ours, truth, case, wrt, upstream=[random_upstream((N, 4)), random_upstream((N,), 3)])
    value, stats = fused_linear_logprob(**case, return_stats=True)
    ls = reference.log_probs(case["input"], case["weight"], case["bias"])
    assert_close(value, reference.linear_logprob(**case))
    assert_close(stats["entropy"], torch.where(kept, reference.entropy(ls), 0.0))
    assert torch.equal(stats["predicted"], torch.where(kept, ls.argmax(-1), -1))
    assert not stats["lse"].requires_grad and set(stats) == {"lse", "entropy", "predicted"}


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_one_of_k_equals_one_target(wrt: tuple[str, ...]) -> None:
    case = inputs(1)
    one = {**case, "target": case["target"][:, 0]}
    upstream = random_upstream((N,))
    several = run(fused_linear_logprob, case, wrt, [upstream[:, None]])
    alone = run(fused_linear_logprob, one, wrt, [upstream])
    assert_close(several[0][0][:, 0], alone[0][0].double())
    for name in wrt:
        assert_close(several[1][name], alone[1][name].double(), name=name)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_banned_entries(wrt: tuple[str, ...]) -> None:
    case = inputs(4, ignored=0)
    case["bias"][case["target"][:5, 0]] = -torch.inf
    case["bias"][90:] = -torch.inf
    upstream = random_upstream((N, 4))
    upstream[:, 0] = 0.0
    check(fused_linear_logprob, reference.linear_logprob, case, wrt, upstream=[upstream])


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_ignored_targets_carry_no_nan(wrt: tuple[str, ...]) -> None:
    case = inputs(3)
    upstream = random_upstream((N, 3))
    clean = run(fused_linear_logprob, case, wrt, [upstream])
    upstream[case["target"] == -100] = torch.nan
    same_bits(clean, run(fused_linear_logprob, case, wrt, [upstream]))
    marked = torch.where(case["target"] == 7, -100, case["target"])  # an id may be the mark
    case["target"] = torch.where(marked == -100, 7, marked)
    check(
        fused_linear_logprob, reference.linear_logprob, case, wrt, ignore_index=7,
        upstream=[upstream.nan_to_num()],
    )  # fmt: skip


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("wrt", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_blocks_shapes_and_strides(wrt: tuple[str, ...]) -> None:
    case = inputs(5)
    shaped = {
        **case,
        "input": case["input"][:28].view(4, 7, D),
        "target": case["target"][:28].view(4, 7, 5),
        "weight": case["weight"].T.contiguous().T,
    }
    small = {"workspace_bytes": workspace_for(5, 28, D, V, loss="logprob")}
    upstream = [random_upstream((4, 7, 5))]
    check(
        fused_linear_logprob, reference.linear_logprob, shaped, wrt, upstream=upstream,
        only_ours=small,
    )  # fmt: skip
    cut = {"vocab_size": 90, "upstream": upstream}
    shaped["target"] = torch.where(shaped["target"] >= 90, -100, shaped["target"])
    check(fused_linear_logprob, reference.linear_logprob, shaped, wrt, **cut)


@pytest.mark.usefixtures("cpu_backend")
def test_every_target_gives_the_whole_distribution() -> None:
    """With K = V a weighted sum of them is any loss over the logits: here the forward KL."""
    pair = make_pair(N, D, V)
    case = single(pair)
    lt = reference.log_probs(pair["teacher_input"], pair["teacher_weight"], pair["teacher_bias"])
    ids = distinct_ids(N, V, V)

    def kl(**arguments: Tensor) -> Tensor:
        ls = fused_linear_logprob(**{**arguments, "target": ids})
        t = lt.gather(-1, ids).to(ls.dtype)
        return (t.exp() * (t - ls)).sum(-1)

    def full(**arguments: Tensor) -> Tensor:
        ls = reference.log_probs(arguments["input"], arguments["weight"], arguments["bias"])
        return reference.divergence(ls, lt.to(ls.dtype), 0.0)

    case.pop("target")
    for dtype in (torch.float32, torch.float64):
        check(kl, full, case, TRAINED, dtype=dtype, upstream=[random_upstream((N,))])


def test_no_tokens() -> None:
    case = inputs(3)
    case = {**case, "input": case["input"][:0], "target": case["target"][:0]}
    values, grads = run(fused_linear_logprob, case, TRAINED)
    assert values[0].shape == (0, 3) and not grads["weight"].any()
    case = inputs(3)
    case["target"].fill_(-100)
    values, grads = run(fused_linear_logprob, case, TRAINED)
    assert not values[0].any() and not any(g.any() for g in grads.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([[1, 2], [3, 3]])}, "distinct ids for each token, got 3 twice"),
        ({"target": torch.tensor([[1, 2], [3, V]])}, f"got {V} at token 1"),
        ({"target": torch.tensor([[1, -7], [3, 4]])}, "got -7 at token 0"),
        ({"target": torch.zeros(2, 0, dtype=torch.int64)}, "expected shape (2,) or (2, 'K')"),
        ({"target": torch.tensor([[1, 2]])}, "expected shape (2,) or (2, 'K')"),
        ({"return_entropy": True}, "return_entropy: needs one target per token"),
    ],
    ids=["twice", "too large", "negative", "none", "rows", "entropy"],
)
def test_refused(change: dict[str, object], message: str) -> None:
    case = {**inputs(2, 2), "target": torch.tensor([[1, 2], [-100, 4]])}
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_linear_logprob(**{**case, **change})
    with pytest.raises(TypeError, match="target: expected an integer dtype"):
        fused_linear_logprob(**{**case, "target": torch.rand(2, 2)})
