"""Records what the launchers would launch on a GPU, by running them on meta tensors.

Meta tensors get addresses like those of a CUDA allocator, and Triton's own code turns the arguments
of a launch into those of a compilation. Two launches are equal if Triton compiles once for both.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from opsd_kernels import Plan, plan
from opsd_kernels.backends import triton_backend, triton_targets
from opsd_kernels.backends.triton_config import Device, device_of
from opsd_kernels.backends.triton_slices import multiply
from opsd_kernels.problem import DivergenceProblem, Execution, GradsNeeded, Head, LogprobProblem

# A few blocks of tokens: what is compiled does not depend on how many there are.
TOKENS, HIDDEN, VOCAB = 1500, 4096, 151936
CAPABILITIES = {80: (8, 0), 90: (9, 0), 100: (10, 0)}
PROCESSORS = {80: 108, 90: 132, 100: 148}
BETAS = (0.0, 0.5, 1.0)
# Schedules and precisions of the backend, as arguments of both `plan` and `Execution`.
RUNS = (
    {"schedule": "blocked", "precision": "fp32"},
    {"schedule": "blocked", "precision": "difference"},
    {"schedule": "tiled", "workspace_bytes": 64 * 2**20},
    {"schedule": "streaming"},
)
# Longer than any tensor, and a multiple of 512 bytes like the addresses of CUDA's allocator.
_APART = 2**40


@dataclass(frozen=True)
class Launch:
    """One compilation: kernel, argument types, constants, alignment and options."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str | tuple[str, ...]], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]  # by position
    aligned: tuple[tuple[int, ...], ...]  # positions of arguments known to be multiples of 16
    options: tuple[tuple[str, object], ...]

    @property
    def constant(self) -> dict[str, object]:
        """Constants by the name of their parameter, without those inside tuples."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if len(path) == 1}

    @property
    def types(self) -> dict[str, str]:
        """Argument types by name; a field of a tuple is "parameter.field"."""
        found = {}
        for name, kind in self.signature:
            if isinstance(kind, tuple):
                found |= {f"{name}.{f}": t for f, t in zip(kind._fields, kind, strict=True)}
            else:
                found[name] = kind
        return found

    @property
    def blocks(self) -> list[int]:
        """Rows, columns and inner size of a tile, as far as the kernel has them."""
        names = ("BLOCK_N", "BLOCK_V", "BLOCK_D")
        return [self.constant[name] for name in names if name in self.constant]

    @property
    def tile(self) -> int:
        """Logits of one head that a program works on at a time; 0 where it works on none."""
        return self.constant.get("BLOCK_V", 0) * self.constant.get("BLOCK_N", 1)

    @property
    def fused(self) -> bool:
        """Whether it multiplies its own tiles, as `streaming` does, or loads them from memory."""
        return "BLOCK_D" in self.constant

    @property
    def threads(self) -> int:
        return 32 * dict(self.options).get("num_warps", 4)


class _Recorder:
    """Replaces a kernel: kernel[grid](...) records what Triton would compile."""

    def __init__(self, kernel: JITFunction, target: int, found: dict[Launch, None]) -> None:
        self.kernel, self.found = kernel, found
        self.backend = make_backend(GPUTarget("cuda", target, 32))
        self.seen: set[tuple[object, ...]] = set()

    @functools.cached_property
    def bind(self) -> Callable[..., Any]:
        kernel = self.kernel
        return create_function_from_signature(kernel.signature, kernel.params, self.backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: object, **flags: object) -> None:
        values, specialization, options = self.bind(*arguments, **flags)
        key = (tuple(specialization), str(options))  # as Triton's own, which finds what is compiled
        if key in self.seen:
            return
        self.seen.add(key)
        _, signature, constants, attrs = self.kernel._pack_args(
            self.backend, flags, values, specialization, options
        )
        self.found[
            Launch(
                self.kernel.fn.__module__, self.kernel.fn.__name__, tuple(signature.items()),
                tuple(constants.items()), tuple(path for path, attr in attrs.items() if attr),
                tuple(options.items()),
            )
        ] = None  # fmt: skip


@contextmanager
def addresses() -> Iterator[None]:
    """Give meta tensors addresses: a base for each storage, plus the tensor's offset in it."""
    # Storages are kept alive, so that no two get the same address.
    places: dict[int, tuple[int, torch.UntypedStorage]] = {}
    real = torch.Tensor.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        if not tensor.is_meta:
            return real(tensor)
        storage = tensor.untyped_storage()
        start, _ = places.setdefault(storage._cdata, ((len(places) + 1) * _APART, storage))
        return start + tensor.storage_offset() * tensor.itemsize

    with mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
        yield


@dataclass(frozen=True)
class Kind:
    """Tensors of a call: rows of `hidden` elements, `stride` apart, and vectors with one entry per
    token, which are views that start at element `offset`."""

    dtype: torch.dtype = torch.bfloat16
    hidden: int = HIDDEN
    stride: int = HIDDEN
    tokens: int = TOKENS
    vocab: int = VOCAB
    offset: int = 0

    def vector(self, dtype: torch.dtype) -> Tensor:
        whole = torch.empty(self.offset + self.tokens, dtype=dtype, device="meta")
        return whole[self.offset :]

    def head(self, softcap: float | None = None, times: int = 1) -> Head:
        hidden = times * self.hidden
        weight = self._rows(self.vocab, times)[:, :hidden]
        return Head(self._rows(self.tokens, times)[:, :hidden], weight, None, softcap, 1.0)

    def pair(self, shared: bool, softcap: float | None = None) -> tuple[Head, Head]:
        """Student and teacher, of one weight or of one each."""
        student, teacher = self.head(softcap), self.head(softcap)
        if shared:
            teacher.weight = student.weight
        return student, teacher

    def _rows(self, rows: int, times: int) -> Tensor:
        return torch.empty(rows, times * self.stride, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.hidden} of {self.stride}"


def launches(
    target: int,
    kind: Kind = Kind(),
    hot: bool = False,
    runs: tuple[dict[str, object], ...] = RUNS,
    scaled: tuple[bool, ...] = (True,),
) -> list[Launch]:
    """Every different launch of both families on a GPU of that compute capability.

    hot: only what training runs by default, without statistics, clip and softcap. `scaled` says
    whether gradients are scaled by row when they are made, as in a loss reduced to a scalar.
    """
    found: dict[Launch, None] = {}
    device = Device(CAPABILITIES[target], PROCESSORS[target])
    with ExitStack() as patches:
        patches.enter_context(addresses())
        for module in [m for n, m in sys.modules.items() if n.startswith("opsd_kernels.backends.")]:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    recorder = _Recorder(value, target, found)
                    patches.enter_context(mock.patch.object(module, name, recorder))
                elif value is device_of:
                    patches.enter_context(mock.patch.object(module, name, lambda _: device))
                elif value is multiply:  # of meta tensors: it computes nothing, and not fast
                    patches.enter_context(mock.patch.object(module, name, _nothing))
        for run in runs:
            if run.get("precision") == "difference" and kind.dtype.itemsize != 2:
                continue
            for scale in scaled:
                _launch(kind, run, hot, scale)
    return list(found)


def _nothing(*_: object, **__: object) -> None:
    """Stands for a product."""


def _launch(kind: Kind, run: dict[str, object], hot: bool, scale: bool) -> None:
    for beta in BETAS:
        one, each = kind.pair(shared=True), kind.pair(shared=False)
        _divergence(kind, one, beta, run, scale)
        # The products of two heads differ from those of one, and what follows them does not: one
        # divergence shows what distinct heads compile to.
        if beta == 0.5 or not hot:
            _divergence(kind, each, beta, run, scale)
        if run["schedule"] == "tiled":  # a trained head keeps its three passes
            _divergence(kind, one, beta, run, scale, trained=True)
        if not hot:
            other = each[0], kind.head(times=2)
            _divergence(kind, one, beta, run, scale, stats=True)
            _divergence(kind, other, beta, run, scale, stats=True)
            if run.get("precision") != "difference":
                _divergence(kind, one, beta, run, scale, clip=0.05)
            _divergence(kind, kind.pair(shared=True, softcap=30.0), beta, run, scale)
    if run.get("precision") == "difference":  # of a pair's logits
        return
    if not hot:
        _targets(kind)
    for smoothing, entropy in ((0.0, False), (0.0, True), (0.1, False)):
        if smoothing == 0.0 or not hot:
            _logprob(kind, smoothing, entropy, run, hot)


def _divergence(
    kind: Kind,
    heads: tuple[Head, Head],
    beta: float,
    run: dict[str, object],
    scaled: bool,
    *,
    clip: float | None = None,
    stats: bool = False,
    trained: bool = False,
) -> None:
    labels = kind.vector(torch.int64)
    p = DivergenceProblem(*heads, labels, None, beta, clip, stats, _execution(run))
    scale = kind.vector(torch.float32) if scaled else None
    chosen = _plan("divergence", heads[0], run, beta, clip, trained)
    triton_backend.divergence(p, chosen, scale, GradsNeeded(hidden=True, weight=trained))


def _logprob(
    kind: Kind, smoothing: float, entropy: bool, run: dict[str, object], hot: bool
) -> None:
    head, target, scale = kind.head(), kind.vector(torch.int64), kind.vector(torch.float32)
    p = LogprobProblem(head, target, None, smoothing, entropy, _execution(run))
    chosen = _plan("logprob", head, run)
    if not hot:
        scales = scale, scale if entropy else None
        triton_backend.logprob(p, chosen, *scales, None, GradsNeeded(hidden=True))
        triton_backend.logprob(
            p, chosen, None, None, None, GradsNeeded(hidden=True, entropy=entropy)
        )
    triton_backend.logprob(p, chosen, None, None, None, GradsNeeded(hidden=not entropy))


def _targets(kind: Kind) -> None:
    """The kernels for several targets per token, beside the pass of one head."""
    head, ids = kind.head(), torch.empty(kind.tokens, 64, dtype=torch.int64, device="meta")
    factors = torch.empty(kind.tokens, 64, dtype=torch.float32, device="meta")
    sums = torch.empty(kind.tokens, kind.hidden, dtype=torch.float32, device="meta")
    triton_targets.target_logits(head, head.hidden, ids)
    triton_targets.add_target_sums(sums, factors, head.weight, ids)
    triton_targets.store_entries(head.hidden, ids, factors)


def _execution(run: dict[str, object]) -> Execution:
    return Execution(**{"workspace_bytes": None, "group_name": None, **run})


def _plan(
    loss: str,
    head: Head,
    run: dict[str, object],
    beta: float = 0.0,
    clip: float | None = None,
    trained: bool = False,
) -> Plan:
    sizes = (*head.hidden.shape, head.weight.shape[0])
    how = {"two_passes": beta not in (0.0, 1.0) or clip is not None, "clipped": clip is not None}
    how["grad_weight"] = trained
    return plan(*sizes, loss=loss, dtype=head.hidden.dtype, device="cuda", **how, **run)
