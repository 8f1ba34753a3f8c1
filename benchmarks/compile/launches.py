"""What the launcher would launch on a GPU: it runs on meta tensors, and each launch is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from unittest import mock

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from opsd_kernels import plan
from opsd_kernels.backends import (
    triton_backend,
    triton_config,
    triton_gradients,
    triton_kernels,
    triton_launch,
)
from opsd_kernels.problem import DivergenceProblem, Execution, Head, LogprobProblem, Wanted

TOKENS, HIDDEN, VOCAB = 8192, 4096, 151936
CAPABILITIES = {80: (8, 0), 90: (9, 0), 100: (10, 0)}
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One compilation: kernel, argument types, constants, alignment and options."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # positions of arguments known to be multiples of 16
    options: tuple[tuple[str, object], ...]
    blocks: str


class _Recorder:
    """Stands in for a kernel: kernel[grid](...) notes its arguments."""

    def __init__(self, kernel, found: dict[Launch, None]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments: object, **flags: object) -> None:
            options = {name: flags.pop(name) for name in _OPTIONS if name in flags}
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | flags
            signature, constants, aligned = {}, {}, []
            for position, name in enumerate(self.kernel.arg_names):
                value = values[name]
                varying = name in triton_kernels.VARYING
                kind = _kind(value)
                if name in flags or value is None or (kind == "i32" and value == 1 and not varying):
                    kind, constants[name] = "constexpr", value
                elif kind[0] == "*" or (kind == "i32" and not varying and value % 16 == 0):
                    aligned.append(position)
                signature[name] = kind
            blocks = "x".join(str(flags[n]) for n in "RCK" if n in flags)
            self.found[
                Launch(
                    self.kernel.__name__, tuple(signature.items()), tuple(constants.items()),
                    tuple(aligned), tuple(options.items()), blocks,
                )
            ] = None  # fmt: skip

        return launch


def _kind(value: object) -> str:
    if isinstance(value, TensorDescriptor):
        shape = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def launches(target: int, dtype: torch.dtype, hidden: int = HIDDEN) -> list[Launch]:
    """Every different launch of both families on a GPU of compute capability `target`."""
    found: dict[Launch, None] = {}
    device = triton_config.Device(CAPABILITIES[target], 132)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton_launch, "device_of", lambda _: device))
        for module in (triton_kernels, triton_gradients):
            for name, kernel in list(vars(module).items()):
                if hasattr(kernel, "arg_names") and not name.startswith("_"):
                    recorder = _Recorder(kernel, found)
                    patches.enter_context(mock.patch.object(module, name, recorder))
        for schedule in ("blocked", "streaming"):
            for p in _divergences(hidden, dtype, schedule):
                _run("divergence", p, p.student, dtype)
            for p in _logprobs(hidden, dtype, schedule):
                _run("logprob", p, p.head, dtype)
    return list(found)


def _run(loss: str, p: DivergenceProblem | LogprobProblem, head: Head, dtype: torch.dtype) -> None:
    schedule = p.execution.schedule
    entropy = loss == "logprob" and p.with_entropy
    chosen = plan(
        *head.hidden.shape, head.weight.shape[0], loss=loss, dtype=dtype, device="cuda",
        schedule=schedule, entropy_grad=entropy, grad_weight=entropy is False,
    )  # fmt: skip
    scale = head.hidden.new_empty(head.hidden.shape[0], dtype=torch.float32)
    if loss == "divergence":
        triton_backend.divergence(p, chosen, scale, Wanted(hidden=True))
        return
    triton_backend.logprob(p, chosen, None, None, Wanted(hidden=True, entropy=entropy))
    triton_backend.logprob(p, chosen, scale, scale if entropy else None, Wanted(hidden=True))


def _head(hidden: int, dtype: torch.dtype, softcap: float | None = None) -> Head:
    with torch.device("meta"):
        h, w = torch.empty(TOKENS, hidden, dtype=dtype), torch.empty(VOCAB, hidden, dtype=dtype)
    return Head(h, w, None, softcap)


def _divergences(hidden: int, dtype: torch.dtype, schedule: str) -> Iterator[DivergenceProblem]:
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    run = Execution(schedule, None, None)
    student = _head(hidden, dtype)
    # Of another hidden size, it cannot share the student's head.
    for teacher, beta in product((_head(hidden, dtype), _head(2 * hidden, dtype)), (0.0, 0.5, 1.0)):
        yield DivergenceProblem(student, teacher, labels, None, beta, 1.0, None, False, run)
        yield DivergenceProblem(student, teacher, labels, None, beta, 1.0, None, True, run)
    teacher = _head(hidden, dtype)
    for beta in (0.0, 0.5, 1.0):
        yield DivergenceProblem(student, teacher, labels, None, beta, 1.0, 0.05, True, run)
    capped = _head(hidden, dtype, 30.0)
    yield DivergenceProblem(capped, capped, labels, None, 0.5, 1.0, None, True, run)


def _logprobs(hidden: int, dtype: torch.dtype, schedule: str) -> Iterator[LogprobProblem]:
    target = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    run = Execution(schedule, None, None)
    for smoothing, entropy in ((0.0, False), (0.0, True), (0.1, False)):
        head = _head(hidden, dtype)
        yield LogprobProblem(head, target, None, 1.0, smoothing, entropy, run)
