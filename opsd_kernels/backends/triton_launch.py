"""Launches the fused Triton kernels on a block of rows: their arguments, grids and results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from opsd_kernels.backends import triton_gradients, triton_kernels, triton_merge
from opsd_kernels.backends.passes import Layout, gathered
from opsd_kernels.backends.precision import tf32_allowed
from opsd_kernels.backends.triton_config import Blocks, Device, blocks, device_of, spans
from opsd_kernels.backends.triton_math import Epilogue
from opsd_kernels.backends.triton_tiles import MatmulSizes
from opsd_kernels.layouts import padded_columns

_GROUP = 8  # row blocks that read the same tiles of the head in turn and find them in L2
# Rows of a program of `merge`, and spans that it loads at a time: there are few programs, so each
# must have many loads in flight.
_MERGE_BLOCK_N, _MERGE_BLOCK_SPANS = 32, 16


@dataclass(frozen=True)
class Source:
    """One head as a fused kernel takes it."""

    x: Tensor  # (rows, D)
    w: Tensor  # (V, D)
    bias: Tensor | None
    softcap: float | None
    temperature: float
    class_weight: Tensor | None = None  # (V,)

    def arguments(self, b: Blocks, use_tma: bool) -> list[object]:
        """x, w, epilogue, sizes; Triton 3.6 takes no tensor descriptors inside a tuple."""
        x, w = self.x, self.w
        if use_tma:
            x = TensorDescriptor.from_tensor(x, [b.rows, b.inner])
            w = TensorDescriptor.from_tensor(w, [b.cols, b.inner])
        epilogue = Epilogue(self.bias, self.softcap, 1.0 / self.temperature)
        return [x, w, epilogue, MatmulSizes(self.x.shape[1], *self.x.stride(), *self.w.stride())]


class FusedTiles:
    """A block of rows whose tiles of logits the kernels multiply where they need them."""

    def __init__(self, sources: list[Source], shared: bool) -> None:
        x = self.hidden = sources[0].x
        self.sources, self.rows, self.cols = sources, x.shape[0], sources[0].w.shape[0]
        self.shared = shared
        self.device = device_of(x.device.index if x.is_cuda else None)
        operands = [t for s in sources for t in (s.x, s.w)]
        depths = [s.x.shape[1] for s in sources]
        self.use_tma = can_use_tma(operands, self.device)
        self.blocks = blocks(
            pair=len(sources) == 2, depths=depths, itemsize=max(t.itemsize for t in operands),
            aligned=aligned(operands), device=self.device,
        )  # fmt: skip
        self.even_d = all(d % self.blocks.inner == 0 for d in depths)
        self.arguments = [a for s in sources for a in s.arguments(self.blocks, self.use_tma)]

    def options(self) -> dict[str, object]:
        """Constants of the kernels for these blocks and tensors."""
        b = self.blocks
        fp32 = any(s.x.dtype == torch.float32 for s in self.sources)
        exact = fp32 and not tf32_allowed()
        shared = {"SHARED": self.shared} if len(self.sources) == 2 else {}
        return {
            "BLOCK_N": b.rows, "BLOCK_V": b.cols, "BLOCK_D": b.inner,
            "PARTS": b.parts, "GROUP": _GROUP,
            "USE_TMA": self.use_tma, "EVEN_D": self.even_d,
            "PRECISION": "ieee" if exact else "tf32", **shared,
            "num_warps": b.warps, "num_stages": b.stages, "enable_fp_fusion": True,
        }  # fmt: skip

    def _spans(self, count: int) -> tuple[int, int, tuple[int], Tensor]:
        b = self.blocks
        span, splits = spans(self.rows, self.cols, b.rows, b.cols, self.device)
        grid = (-(-self.rows // self.blocks.rows) * splits,)
        x = self.sources[0].x
        return span, splits, grid, x.new_empty(count, splits, self.rows, dtype=torch.float32)

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Fill `out` (K, rows), a view of any row stride, with the statistics of this block."""
        span, splits, grid, parts = self._spans(layout.count)
        label = label if layout.label else None
        numbers = (self.rows, self.cols, offset, self.rows, span, splits)
        flags = {"ENTROPY": layout.entropy, **self.options()}
        if layout.heads == 2:
            triton_kernels.statistics_pair[grid](
                *self.arguments, label, parts, *numbers, **flags, KIND=layout.kind
            )
        else:
            triton_kernels.statistics[grid](
                *self.arguments, self.sources[0].class_weight, label, parts, *numbers, **flags,
                SMOOTHED=layout.smoothed, PREDICTED=layout.predicted,
            )  # fmt: skip
        merge(parts, out, layout, group)

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(2 or 3, rows): value, sum of shares and, with a clip, the value without it."""
        span, splits, grid, parts = self._spans(2 if clip is None else 3)
        triton_kernels.divergence_sums[grid](
            *self.arguments, merged, parts, self.rows, self.cols, merged.stride(0), self.rows,
            beta, 1.0 - beta, clip, span, splits, **self.options(),
            HEAD_STATISTICS=len(layout.names), KIND=layout.kind,
        )  # fmt: skip
        return summed(parts, group)

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        totals: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,  # (rows, columns)
    ) -> None:
        triton_gradients.divergence_gradient[self._grid(columns)](
            *self.arguments, merged, totals, scale, out, self.rows, self.cols, merged.stride(0),
            out.stride(0), beta, 1.0 - beta, clip, *_ends(columns),
            **self.options(), HEAD_STATISTICS=len(layout.names), KIND=layout.kind,
        )  # fmt: skip

    def logprob_gradient(
        self,
        label: Tensor,
        merged: Tensor,
        entropy: Tensor | None,
        scales: tuple[Tensor | None, Tensor | None],
        rates: Tensor | None,
        uniform: float,
        offset: int,
        columns: slice,
        outs: list[Tensor],  # (rows, columns), and another for the entropy's own gradient
    ) -> None:
        triton_gradients.logprob_gradient[self._grid(columns)](
            *self.arguments, self.sources[0].class_weight, label, merged, rates, entropy, *scales,
            outs[0], outs[1] if len(outs) == 2 else None, self.rows, self.cols, offset,
            merged.stride(0), outs[0].stride(0), uniform, *_ends(columns),
            **self.options(),
        )  # fmt: skip

    def _grid(self, columns: slice) -> tuple[int]:
        start, stop = _ends(columns)
        tiles = -(-(stop - start) // self.blocks.cols)
        return (-(-self.rows // self.blocks.rows) * tiles,)


def _ends(columns: slice) -> tuple[int, int]:
    """First and last column of a slice of dz, whose rows are padded: whole vectors to the end."""
    return columns.start, columns.start + padded_columns(columns.stop - columns.start)


def aligned(tensors: list[Tensor]) -> bool:
    """Whether every row starts at whole 16 bytes: loads of that size, and TMA, need it."""
    return all(
        t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )


def can_use_tma(tensors: list[Tensor], device: Device) -> bool:
    """Whether all can be read by TMA: Hopper or later, aligned rows."""
    return device.capability is not None and device.capability[0] >= 9 and aligned(tensors)


class PreparedLaunch:
    """A launch to be repeated with the same arguments, at the same addresses.

    Triton looks up the compiled kernel at every launch, by the types and alignment of all
    arguments, which took the host 60 us; the compiled kernel itself takes them as they are.
    """

    def __init__(
        self, kernel: triton.JITFunction, programs: int, *arguments: object, **flags: object
    ) -> None:
        self.kernel, self.programs, self.arguments, self.flags = kernel, programs, arguments, flags
        self.compiled: Callable[..., None] | None = None

    def __call__(self) -> None:
        if self.compiled is not None:
            self.compiled(*self.arguments)
            return
        found = self.kernel[(self.programs,)](*self.arguments, **self.flags)
        if isinstance(found, CompiledKernel):  # not under Triton's interpreter
            # It takes all parameters in their order, constants too, and reads the current stream.
            names = self.kernel.arg_names[len(self.arguments) :]
            self.arguments += tuple(self.flags[name] for name in names)
            self.compiled = found[(self.programs, 1, 1)]


def merge(parts: Tensor, out: Tensor, layout: Layout, group: dist.ProcessGroup | None) -> None:
    """Fill `out` (K, rows) from the statistics of spans (K, spans, rows), then from all ranks'."""
    _merge(parts, out, layout)
    if group is not None:  # the ranks' results are merged as those of spans are, in rank order
        _merge(gathered(out, group), out, layout)


def summed(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(K, rows) sums over spans (K, spans, rows) and ranks."""
    total = parts.sum(1)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def _merge(parts: Tensor, out: Tensor, layout: Layout) -> None:
    rows = out.shape[1]
    # Without fusion all threads that have a row's sum have the same bits: a product fused with the
    # first addition across threads is rounded differently in each.
    triton_merge.merge[(triton.cdiv(rows, _MERGE_BLOCK_N),)](
        parts, out, rows, out.stride(0), parts.shape[1], parts.shape[2],
        BLOCK_N=_MERGE_BLOCK_N, BLOCK_SPANS=_MERGE_BLOCK_SPANS, HEADS=layout.heads,
        ENTROPY=layout.entropy, SMOOTHED=layout.smoothed, LABEL=layout.label,
        PREDICTED=layout.predicted, KIND=layout.kind, enable_fp_fusion=False,
    )  # fmt: skip
