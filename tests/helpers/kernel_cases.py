"""Runs an operation with its gradients; compares it with the float64 truth and plain PyTorch."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels import plan, reference
from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.testing import assert_close, cast, random_upstream, single

STUDENT = ("student_input", "student_weight", "student_bias")
ALONE_AND_TOGETHER = [
    STUDENT[:1],
    STUDENT[1:2],
    STUDENT[2:],
    STUDENT[:2],
    STUDENT[::2],
    STUDENT[1:],
    STUDENT,
]
SINGLE = ("input", "weight", "bias")


def run(
    fn: Callable,
    tensors: dict[str, Tensor],
    wrt: Sequence[str] = (),
    upstream: Sequence[Tensor | float] | None = None,
    **options: object,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Tensor outputs of fn, and the gradients of sum(output * upstream) wrt the named tensors."""
    leaves = dict(tensors)
    for name in wrt:
        # detach() keeps strides and storage, so non-contiguous inputs stay what they are.
        leaves[name] = tensors[name].detach().requires_grad_()
    result = fn(**leaves, **options)
    outputs = (
        [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    )
    if not wrt:
        return outputs, {}
    flowing = [x for x in outputs if x.requires_grad]
    if upstream is None:
        upstream = [random_upstream(tuple(x.shape)) if x.dim() else 0.7 for x in flowing]
    scale = [
        u.to(x) if isinstance(u, Tensor) else u for u, x in zip(upstream, flowing, strict=True)
    ]
    total = sum((x * u).sum() for x, u in zip(flowing, scale, strict=True))
    grads = torch.autograd.grad(total, [leaves[name] for name in wrt])
    return outputs, dict(zip(wrt, grads, strict=True))


def check(
    fn: Callable,
    truth_fn: Callable,
    tensors: dict[str, Tensor],
    wrt: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    value_factor: float = 2.0,
    grad_factor: float = 2.0,
    max_factor: float | None = None,
    upstream: Sequence[Tensor | float] | None = None,
    only_ours: dict[str, object] | None = None,
    **options: object,
) -> None:
    """fn in `dtype` against truth_fn in float64, with truth_fn in `dtype` as the yardstick.

    fn and the yardstick run on `device`, the truth where the tensors are.
    """
    inputs = cast(tensors, dtype)
    there, how = move(inputs, device), move(options, device)
    ours, our_grads = run(fn, there, wrt, upstream, **how, **(only_ours or {}))
    true, true_grads = run(truth_fn, cast(inputs, torch.float64), wrt, upstream, **options)
    plain, plain_grads = run(truth_fn, there, wrt, upstream, **how)
    for i, (a, t, p) in enumerate(zip(ours, true, plain, strict=True)):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        luck = 0.0 if t.dim() else token_error(truth_fn, there, how)
        a, p = a.to(t.device), p.to(t.device)
        assert_close(a, t, p, factor=value_factor, atol=value_factor * luck, name=f"output {i}")
    for name in wrt:
        assert our_grads[name].dtype == dtype
        t = true_grads[name]
        a, p = our_grads[name].to(t.device), plain_grads[name].to(t.device)
        assert_close(a, t, p, factor=grad_factor, max_factor=max_factor, name=f"gradient of {name}")


def move(values: dict[str, object], device: torch.device | str) -> dict[str, object]:
    """Tensors on the device; what is no tensor stays as it is."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}


def token_error(truth_fn: Callable, inputs: dict[str, Tensor], options: dict[str, object]) -> float:
    """What plain PyTorch's per-token errors add up to in the reduced loss, without cancelling.

    The error of its one scalar can be 0 by luck, and is no yardstick by itself.
    """
    if "reduction" not in inspect.signature(truth_fn).parameters:
        return 0.0
    each = {**options, "reduction": "none"}
    gap = truth_fn(**inputs, **each).double() - truth_fn(**cast(inputs, torch.float64), **each)
    labels = inputs.get("shift_labels", inputs.get("target"))
    # The weights are in the per-token losses already.
    names = ("reduction", "num_tokens", "ignore_index")
    how = {name: options[name] for name in names if name in options}
    return reference.reduce_tokens(gap.nan_to_num().abs(), labels, **how).item()


def same_bits(first: tuple, second: tuple) -> None:
    """Two results of `run` are equal bit by bit."""
    for i, (a, b) in enumerate(zip(first[0], second[0], strict=True)):
        assert torch.equal(a, b), f"output {i}"
    for name, grad in first[1].items():
        assert torch.equal(grad, second[1][name]), name


def workspace_for(rows: int, tokens: int, hidden: int, vocab: int, **options: object) -> int:
    """The largest workspace_bytes that plan() splits into blocks of at most `rows` rows."""

    def fits(budget: int) -> bool:
        try:
            chosen = plan(tokens, hidden, vocab, workspace_bytes=budget, **options)
        except ValueError:
            return True
        return chosen.rows_per_block <= rows

    low, high = 1, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def reference_entropy(**arguments: object) -> Tensor:
    return reference.linear_logprob(**arguments, return_entropy=True)[1]


# ---------------------------------------------------- every public loss and what it is compared to


def policy_gradient(
    *,
    target: Tensor,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    **p: object,
) -> Tensor:
    advantage, chosen = fused_linear_advantage(**p, target=target)
    how = {"reduction": reduction, "num_tokens": num_tokens}
    return policy_gradient_loss(advantage, chosen, target, **how)


def plain_policy_gradient(*, target: Tensor, reduction: str = "mean", **p: object) -> Tensor:
    advantage, chosen = reference.linear_advantage(**p, target=target)
    return reference.reduce_tokens(-advantage * chosen, target, reduction=reduction)


class Loss(NamedTuple):
    fn: Callable
    truth: Callable
    options: dict[str, object]
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # of a pair


def both(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return pair


def sampled(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return {("target" if k == "shift_labels" else k): v for k, v in pair.items()}


def jsd(beta: float) -> Loss:
    return Loss(fused_linear_jsd, reference.linear_jsd, {"beta": beta}, both)


REDUCED = {
    "jsd 0": jsd(0.0),
    "jsd 0.1": jsd(0.1),
    "jsd 0.5": jsd(0.5),
    "jsd 1": jsd(1.0),
    "forward kl": Loss(
        fused_linear_forward_kl, functools.partial(reference.linear_jsd, beta=0.0), {}, both
    ),
    "reverse kl": Loss(
        fused_linear_reverse_kl, functools.partial(reference.linear_jsd, beta=1.0), {}, both
    ),
    "cross-entropy": Loss(
        fused_linear_cross_entropy, reference.linear_cross_entropy, {"label_smoothing": 0.1}, single
    ),
    "policy gradient": Loss(policy_gradient, plain_policy_gradient, {}, sampled),
}
PER_TOKEN = {
    "logprob and entropy": Loss(
        fused_linear_logprob, reference.linear_logprob, {"return_entropy": True}, single
    ),
    "advantage": Loss(fused_linear_advantage, reference.linear_advantage, {}, sampled),
}
LOSSES = {**REDUCED, **PER_TOKEN}


def prepare(
    name: str, pair: dict[str, Tensor], trained: bool, reduction: str | None
) -> tuple[Loss, dict[str, Tensor], tuple[str, ...], dict[str, object]]:
    """The loss, its inputs, the names to differentiate and its options."""
    loss = LOSSES[name]
    names = SINGLE if loss.inputs is single else STUDENT
    options = dict(loss.options) if reduction is None else {**loss.options, "reduction": reduction}
    return loss, loss.inputs(pair), names if trained else names[:1], options
