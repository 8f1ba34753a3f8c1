"""Top-k, several targets per token and the sparse divergence on a CUDA device, by schedule.

The truth is float64 over full logits on the CPU, the yardstick as in test_cuda. That of values and
ids is fp32, because plain PyTorch rounds the logits of 16 bits. Graphs are in test_cuda_graphs,
torch.compile is in test_cuda, memory in test_cuda_memory.
"""

import functools

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.sparse_divergence import topk_divergence
from opsd_kernels.testing import assert_close, cast, make_pair, random_upstream, single
from tests.helpers import topk_cases
from tests.helpers.kernel_cases import SINGLE, STUDENT, check, move, run, same_bits
from tests.helpers.topk_cases import integer_case, random_case, targets_case
from tests.helpers.triton_cases import TRAINED, check_stays_on_the_current_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("ieee_float32"),
]
DEVICE = torch.device("cuda")
# Several blocks of rows and, in `tiled`, several slices of an odd vocabulary.
TOKENS, HIDDEN, VOCAB = 130, 64, 20011
REAL = (40, 4096, 151936)
K = 16  # of the sparse divergence
LOW = {"grad_factor": 1.2, "max_factor": 2.0}
RULES = {torch.float32: {"max_factor": 4.0}, torch.bfloat16: LOW, torch.float16: LOW}
IN_EACH_DTYPE = pytest.mark.parametrize("dtype", RULES, ids=str)
IN_TWO_DTYPES = pytest.mark.parametrize("dtype", list(RULES)[:2], ids=str)
BLOCKED, TILED, STREAMING = (
    {"schedule": name, "workspace_bytes": 1 << 20} for name in ("blocked", "tiled", "streaming")
)
CHOOSING = pytest.mark.parametrize("how", [BLOCKED, TILED], ids=["blocked", "tiled"])
EACH = pytest.mark.parametrize("how", [BLOCKED, TILED, STREAMING], ids=lambda how: how["schedule"])


# -------------------------------------------------------------------------------------------- top-k


@IN_EACH_DTYPE
@pytest.mark.parametrize("k", [1, 64, 1000])
@CHOOSING
def test_top_k(how: dict, k: int, dtype: torch.dtype) -> None:
    options = {"softcap": 6.0, "temperature": 0.7} if k == 64 else {}
    options["near"] = 5e-5  # tensor cores round a sum more than fp32 does
    topk_cases.check(random_case(TOKENS, HIDDEN, VOCAB), k, dtype, DEVICE, how, **options)


@pytest.mark.parametrize("k", [1, 64, VOCAB])
@CHOOSING
def test_ties_and_banned_entries(how: dict, k: int) -> None:
    """Sums of small integers are exact in any order, so every id is known."""
    case = integer_case(TOKENS, 8, VOCAB)
    true = reference.linear_topk(**case, k=k)
    found = fused_linear_topk(**move(cast(case, torch.bfloat16), DEVICE), k=k, **how)
    assert torch.equal(found[1].cpu(), true[1])
    assert found[0].isneginf().any() == (k == VOCAB)
    topk_cases.check(case, k, torch.bfloat16, DEVICE, how)


@CHOOSING
def test_nan_leaves_valid_ids_and_other_rows_their_bits(how: dict) -> None:
    case = move(cast(random_case(TOKENS, HIDDEN, VOCAB), torch.float32), DEVICE)
    del case["shift_labels"]
    clean = fused_linear_topk(**case, k=90, **how)
    case["input"][7] = torch.nan
    logprob, ids, lse = fused_linear_topk(**case, k=90, **how)
    assert lse.isnan().nonzero().tolist() == [[7]] and logprob[7].isnan().all()
    in_order = ids.sort(-1).values
    assert (in_order.diff() > 0).all() and in_order[:, 0].min() >= 0 and ids.max() < VOCAB
    others = torch.arange(TOKENS, device=DEVICE) != 7
    for found, expected in zip((logprob, ids, lse), clean, strict=True):
        assert torch.equal(found[others], expected[others])


# -------------------------------------------------------------------------- several targets a token


def check_targets(
    case: dict[str, Tensor], trained: bool, dtype: torch.dtype, how: dict, **options: object
) -> None:
    wrt = SINGLE if trained else SINGLE[:1]
    rules = {"dtype": dtype, "device": DEVICE, **RULES[dtype]}
    rules |= {"only_ours": how}
    check(fused_linear_logprob, reference.linear_logprob, case, wrt, **rules, **options)
    options.pop("upstream", None)
    rounded = cast(case, dtype)
    found = fused_linear_logprob(**move(rounded, DEVICE), **options, **how)
    true, plain = (
        reference.linear_logprob(**cast(rounded, wide), **options)
        for wide in (torch.float64, torch.float32)
    )
    assert_close(found.cpu(), true, plain, max_factor=4.0, name="values")


@IN_EACH_DTYPE
@TRAINED
@EACH
def test_targets(how: dict, trained: bool, dtype: torch.dtype) -> None:
    check_targets(targets_case(37, TOKENS, HIDDEN, VOCAB, ignored=5), trained, dtype, how)


# One, all, and a hidden size that only pointers can read.
@IN_TWO_DTYPES
@pytest.mark.parametrize("count", [1, 1111])
@TRAINED
@EACH
def test_few_and_all_targets(how: dict, trained: bool, count: int, dtype: torch.dtype) -> None:
    options = {"softcap": 6.0, "temperature": 0.7, "logit_scale": 1.5}
    check_targets(targets_case(count, 33, 67, 1111), trained, dtype, how, **options)


@IN_TWO_DTYPES
@TRAINED
@EACH
def test_banned_targets(how: dict, trained: bool, dtype: torch.dtype) -> None:
    case = targets_case(4, TOKENS, HIDDEN, VOCAB, ignored=0)
    case["bias"][case["target"][:5, 0]] = -torch.inf
    case["bias"][20000:] = -torch.inf
    upstream = random_upstream((TOKENS, 4))
    upstream[(case["bias"] == -torch.inf)[case["target"]]] = 0.0  # those are 0 times infinity
    check_targets(case, trained, dtype, how, upstream=[upstream])


@IN_TWO_DTYPES
@TRAINED
@EACH
def test_near_certain_targets_do_not_cancel(how: dict, trained: bool, dtype: torch.dtype) -> None:
    case = single(make_pair(48, 256, 256, kind="onehot", std=5.0, masked=3))
    label = case["target"].clamp(min=0)
    case["target"] = torch.stack([label, (label + 7) % 256, (label + 50) % 256], 1)
    upstream = [torch.tensor([1.0, 0.0, 0.0]).expand(48, 3).double()]
    check_targets(case, trained, dtype, how, upstream=upstream)


@TRAINED
@EACH
def test_what_has_no_target_may_hold_anything(how: dict, trained: bool) -> None:
    """And two runs give the same bits, with other bytes in their buffers."""
    case = move(cast(targets_case(37, TOKENS, HIDDEN, VOCAB, 5), torch.bfloat16), DEVICE)
    wrt = SINGLE if trained else SINGLE[:1]
    upstream = random_upstream((TOKENS, 37)).to(DEVICE)
    first = run(fused_linear_logprob, case, wrt, [upstream], **how)
    assert all(grad.abs().max() > 0 for grad in first[1].values())
    dropped = (case["target"] == -100).all(-1)
    case["input"][dropped] = torch.nan
    upstream[case["target"] == -100] = torch.nan
    same_bits(first, run(fused_linear_logprob, case, wrt, [upstream], **how))


# ------------------------------------------------------------------------------- sparse divergence


def sparse(beta: float, how: dict, *, ids: Tensor, shift_labels: Tensor, **p: Tensor) -> Tensor:
    """By our operators; `ids` are those that the truth has."""
    (*teacher, bias), (*student, student_bias) = heads(p)
    choice = {"bias": bias, "shift_labels": shift_labels, **({} if how is STREAMING else how)}
    log_t, found, _ = fused_linear_topk(*teacher, K, **choice)
    assert torch.equal(found, ids)
    log_s = fused_linear_logprob(*student, found, bias=student_bias, **how)
    return topk_divergence(log_s, log_t, beta)


def plain(beta: float, *, ids: Tensor, shift_labels: Tensor, **p: Tensor) -> Tensor:
    """Over full logits; the rest of the vocabulary is summed, not what is left of 1."""
    log_t, log_s = (reference.log_probs(*head) for head in heads(p))
    ids = ids.clamp(min=0)
    sides = [
        torch.cat([x.gather(-1, ids), x.scatter(-1, ids, -torch.inf).logsumexp(-1, True)], -1)
        for x in (log_s, log_t.detach())
    ]
    return torch.where(shift_labels != -100, reference.divergence(*sides, beta), 0.0)


def heads(p: dict[str, Tensor]) -> list[list[Tensor]]:
    """Hidden states, weight and bias of teacher and student."""
    return [[p[f"{who}_{x}"] for x in SINGLE] for who in ("teacher", "student")]


@IN_EACH_DTYPE
@TRAINED
@pytest.mark.parametrize(
    ("beta", "how"), [(0.0, BLOCKED), (0.5, TILED), (1.0, STREAMING)], ids=["0", "0.5", "1"]
)
def test_sparse_divergence(beta: float, how: dict, trained: bool, dtype: torch.dtype) -> None:
    # Wider logits leave a small rest, 1 less a sum near 1, whose rounding the yardstick has not.
    # With this seed the teacher's largest logits are 6e-5 apart, so that their order is known.
    pair = make_pair(96, HIDDEN, 1111, masked=9, seed=14, std=2.0)
    hidden, weight, bias = heads(cast(cast(pair, dtype), torch.float64))[0]
    choosing = {"k": K, "bias": bias, "shift_labels": pair["shift_labels"]}
    pair["ids"] = reference.linear_topk(hidden, weight, **choosing)[1]
    ours, truth = functools.partial(sparse, beta, how), functools.partial(plain, beta)
    wrt = STUDENT if trained else STUDENT[:1]
    check(ours, truth, pair, wrt, dtype=dtype, device=DEVICE, **RULES[dtype])


# ------------------------------------------------------------------------- streams, a model's head


def test_top_k_stays_on_the_current_stream() -> None:
    case = move(cast(random_case(TOKENS, HIDDEN, VOCAB), torch.float32), DEVICE)
    check_stays_on_the_current_stream(fused_linear_topk, case, (), k=64)


@TRAINED
def test_targets_stay_on_the_current_stream(trained: bool) -> None:
    case = move(cast(targets_case(37, TOKENS, HIDDEN, VOCAB), torch.float32), DEVICE)
    check_stays_on_the_current_stream(fused_linear_logprob, case, SINGLE if trained else SINGLE[:1])


@pytest.mark.slow
@TRAINED
@EACH
def test_a_head_as_models_have_it(how: dict, trained: bool) -> None:
    """float64 on the device too; of the head's gradient the rows of the targets."""
    tokens, hidden, vocab = REAL
    g = torch.Generator(DEVICE).manual_seed(14)
    h = torch.randn(tokens, hidden, device=DEVICE, generator=g).bfloat16()
    w = torch.randn(vocab, hidden, device=DEVICE, generator=g).mul_(3 / hidden**0.5).bfloat16()
    z = (h.double() @ w.double().t()).requires_grad_()
    exact, rounded = z.log_softmax(-1), torch.mm(h, w.t(), out_dtype=torch.float32).log_softmax(-1)
    true, ids = exact.topk(64)
    if how is not STREAMING:
        found, chosen, _ = fused_linear_topk(h, w, 64, **how)
        assert (chosen.sort(-1).values.diff() > 0).all()
        assert_close(found, true, rounded.gather(-1, ids), max_factor=4.0, name="largest")
        at_ids = exact.gather(-1, chosen), rounded.gather(-1, chosen)
        assert_close(found, *at_ids, max_factor=4.0, name="at the ids")
    case, wrt = {"input": h, "weight": w, "target": ids}, SINGLE[: 1 + trained]
    upstream = [random_upstream((tokens, 64)).to(DEVICE)]
    values, grads = run(fused_linear_logprob, case, wrt, upstream, **how)
    _, yardstick = run(reference.linear_logprob, case, wrt, upstream)
    assert_close(values[0], true, rounded.gather(-1, ids), max_factor=4.0, name="values")
    (dz,) = torch.autograd.grad((true * upstream[0]).sum(), z)
    close = functools.partial(assert_close, factor=1.2, max_factor=2.0)
    close(grads["input"], dz @ w.double(), yardstick["input"], name="input")
    if trained:
        some = ids.unique()
        dw = dz[:, some].t() @ h.double()
        close(grads["weight"][some], dw, yardstick["weight"][some], name="weight")
