"""What the launcher would launch on a GPU: it runs on meta tensors, and each launch is recorded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from opsd_kernels import Plan, plan
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
            for position, parameter in enumerate(self.kernel.params):
                name, value = parameter.name, values[parameter.name]
                kind, free = _kind(value), not parameter.do_not_specialize
                if name in flags or value is None or (kind == "i32" and value == 1 and free):
                    kind, constants[name] = "constexpr", value
                elif kind[0] == "*":
                    if not parameter.do_not_specialize_on_alignment:
                        aligned.append(position)
                elif kind == "i32" and free and value % 16 == 0:
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


@dataclass(frozen=True)
class Kind:
    """Tensors of hidden states and heads: rows of `hidden` elements, `stride` apart."""

    dtype: torch.dtype = torch.bfloat16
    hidden: int = HIDDEN
    stride: int = HIDDEN

    def head(self, softcap: float | None = None, times: int = 1) -> Head:
        sizes = [(rows, times * self.stride) for rows in (TOKENS, VOCAB)]
        h, w = (torch.empty(size, dtype=self.dtype, device="meta") for size in sizes)
        hidden = times * self.hidden
        return Head(h[:, :hidden], w[:, :hidden], None, softcap)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.hidden} of {self.stride}"


def launches(target: int, kind: Kind = Kind(), hot: bool = False) -> list[Launch]:
    """Every different launch of both families on a GPU of that compute capability.

    hot: only what training runs by default, without statistics, clip and softcap.
    """
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
            _launch(kind, Execution(schedule, None, None), hot)
    return list(found)


def _launch(kind: Kind, run: Execution, hot: bool) -> None:
    student, teacher, capped = kind.head(), kind.head(), kind.head(30.0)
    other = kind.head(times=2)  # of another hidden size, it cannot share the student's head
    for beta in (0.0, 0.5, 1.0):
        _divergence(student, teacher, beta, None, False, run)
        if not hot:
            _divergence(student, teacher, beta, None, True, run)
            _divergence(student, other, beta, None, True, run)
            _divergence(student, teacher, beta, 0.05, False, run)
            _divergence(capped, capped, beta, None, False, run)
    for smoothing, entropy in ((0.0, False), (0.0, True), (0.1, False)):
        if smoothing == 0.0 or not hot:
            _logprob(student, smoothing, entropy, run, hot)


def _divergence(
    student: Head, teacher: Head, beta: float, clip: float | None, stats: bool, run: Execution
) -> None:
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    p = DivergenceProblem(student, teacher, labels, None, beta, 1.0, clip, stats, run)
    scale = labels.new_empty(TOKENS, dtype=torch.float32)
    triton_backend.divergence(p, _plan("divergence", student, run), scale, Wanted(hidden=True))


def _logprob(head: Head, smoothing: float, entropy: bool, run: Execution, hot: bool) -> None:
    target = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    scale = target.new_empty(TOKENS, dtype=torch.float32)
    p = LogprobProblem(head, target, None, 1.0, smoothing, entropy, run)
    chosen = _plan("logprob", head, run)
    if not hot:
        scales = scale, scale if entropy else None
        triton_backend.logprob(p, chosen, *scales, Wanted(hidden=True))
        triton_backend.logprob(p, chosen, None, None, Wanted(hidden=True, entropy=entropy))
    triton_backend.logprob(p, chosen, None, None, Wanted(hidden=not entropy))


def _plan(loss: str, head: Head, run: Execution) -> Plan:
    sizes = (*head.hidden.shape, head.weight.shape[0])
    how = {"loss": loss, "dtype": head.hidden.dtype, "device": "cuda"}
    return plan(*sizes, **how, schedule=run.schedule)
