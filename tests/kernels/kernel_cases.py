"""Runs an operation with its gradients; compares it with the float64 truth and plain PyTorch."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opsd_kernels import plan, reference
from opsd_kernels.testing import assert_close, cast, random_upstream

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
        u.to(x.dtype) if isinstance(u, Tensor) else u
        for u, x in zip(upstream, flowing, strict=True)
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
    value_factor: float = 2.0,
    grad_factor: float = 2.0,
    max_factor: float | None = None,
    upstream: Sequence[Tensor | float] | None = None,
    only_ours: dict[str, object] | None = None,
    **options: object,
) -> None:
    """fn in `dtype` against truth_fn in float64, with truth_fn in `dtype` as the yardstick."""
    inputs = cast(tensors, dtype)
    ours, our_grads = run(fn, inputs, wrt, upstream, **options, **(only_ours or {}))
    true, true_grads = run(truth_fn, cast(inputs, torch.float64), wrt, upstream, **options)
    plain, plain_grads = run(truth_fn, inputs, wrt, upstream, **options)
    for i, (a, t, p) in enumerate(zip(ours, true, plain, strict=True)):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        luck = 0.0 if t.dim() else token_error(truth_fn, inputs, options)
        assert_close(a, t, p, factor=value_factor, atol=value_factor * luck, name=f"output {i}")
    for name in wrt:
        assert our_grads[name].dtype == dtype
        a, t, p = our_grads[name], true_grads[name], plain_grads[name]
        assert_close(a, t, p, factor=grad_factor, max_factor=max_factor, name=f"gradient of {name}")


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
