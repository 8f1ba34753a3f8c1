"""The C++ operators of the CPU (csrc/) as a backend of the two-pass driver.

Statistics are made while a tile of logits is in cache. Logits are float32 for any input dtype; they
are stored only if a later pass reads them, and their gradient overwrites them.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import extension
from opsd_kernels.backends import blocked_torch, two_pass
from opsd_kernels.backends.largest import Largest, topk_of
from opsd_kernels.backends.passes import JSD, BlockedPass, Gradient, Layout, gathered
from opsd_kernels.cpu_layouts import dz_waits
from opsd_kernels.plan import Plan
from opsd_kernels.problem import GradsNeeded, Head, TopkProblem

_AMX_COLUMNS = 32


class _Pass(BlockedPass["_Tiles"]):
    """Blocks of logits, and the products with their gradient."""

    multiplied = 0  # rows whose product with the head's gradient is added

    def buffer(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """As the base class, in huge pages."""
        if name not in self.buffers:
            self.buffers[name] = torch.ops.opsd_cpu.large_empty([rows, columns], dtype, True)
        return self.buffers[name][:rows]

    @property
    def _rounds_once(self) -> bool:
        """Whether the last block's product rounds the head's gradient to bfloat16."""
        return self.head.weight.dtype == torch.bfloat16 and extension.multiplies_bf16()

    def new_grad_weight(self) -> Tensor:
        dtype = torch.bfloat16 if self._rounds_once else self.dtype
        weight: Tensor = torch.ops.opsd_cpu.large_empty(self.head.weight.shape, dtype, False)
        return weight

    def add_weight_product(
        self, grad_weight: Tensor, dz: Tensor, h: Tensor, *, first: bool
    ) -> None:
        if not self._rounds_once:
            super().add_weight_product(grad_weight, dz, h, first=first)
            return
        done = self.multiplied
        self.multiplied += len(h)
        last, sums = self.multiplied == self.num_kept, None
        if dz_waits(self.plan.num_tokens, self.plan.hidden_size) and not (first and last):
            for name, part in (("dz", dz), ("hidden", h)):
                buffer = self.buffer(name, self.num_kept, part.shape[1], part.dtype)
                buffer[done : self.multiplied] = part
            if not last:
                return
            first, dz, h = True, self.buffers["dz"], self.buffers["hidden"]
        elif not (first and last):
            sums = self.buffer("sums", *grad_weight.shape)
        torch.ops.opsd_cpu.weight_gradient(dz, h, sums, not first, grad_weight if last else None)

    def tiles(self, heads: list[Head], block: slice, shared: bool, again: bool) -> _Tiles:
        hidden = [self.part(head.hidden, block) for head in heads]
        rows, vocab = hidden[0].shape[0], heads[0].weight.shape[0]
        logits = hidden[0].new_empty(0, dtype=torch.float32)
        if again:
            most = max(block.stop - block.start for block in self.blocks())
            buffer = self.buffer("logits", len(heads) * most, vocab)
            logits = buffer[: len(heads) * rows].view(len(heads), rows, vocab)
        return _Tiles(
            heads,
            hidden,
            logits,
            shared,
            self.needed.any,
            self.optional_part(self.row_scale, block),
            None if self.known_logits is None else self.known_ids(self._rows(block)),
        )

    def gradients(self, block: slice, tiles: _Tiles, gradient: Gradient) -> None:
        vocab, h = tiles.logits.shape[-1], tiles.hidden[0]
        dz = [tiles.dz()]
        if self.needed.entropy:
            dz.append(self.buffer("entropy", len(h), vocab, dz[0].dtype))
        gradient(slice(0, vocab), dz)
        tiles.clear_beyond()
        rows = self._rows(block)
        first = block.start == 0
        if h.dtype == torch.float16:
            self.add_widened_products(rows, h, dz, self.plan.widened_rows, first=first)
        else:
            self.add_products(rows, h, dz, first=first)

    def _rows(self, block: slice) -> Tensor | slice:
        return block if self.kept is None else self.kept[block]

    def target_logits(self, tiles: _Tiles, rows: Tensor | slice) -> Tensor:
        assert tiles.target_logit is not None  # `tiles` was given the ids
        return tiles.target_logit

    def store_entries(self, dz: Tensor, ids: Tensor, values: Tensor) -> None:
        torch.ops.opsd_cpu.store_entries(values, ids, dz)


class _Tiles:
    """One block's operands, and its logits (heads, rows, V), empty if they are not stored."""

    def __init__(
        self,
        heads: list[Head],
        hidden: list[Tensor],
        logits: Tensor,
        shared: bool,
        differentiated: bool,
        scale: Tensor | None,  # (rows,) of the gradient of the value
        targets: Tensor | None = None,  # (rows, K) columns whose logits the first pass keeps
    ) -> None:
        self.heads, self.hidden, self.logits = heads, hidden, logits
        self.shared, self.differentiated, self.scale = shared, differentiated, scale
        self.targets = targets
        self.target_logit = None if targets is None else logits.new_empty(targets.shape)
        self.has_gradient = False
        self.softcaps = [head.softcap or 0.0 for head in heads]
        self.temperatures = [head.temperature for head in heads]

    @property
    def _bf16(self) -> bool:
        """Whether the gradient of the logits is bfloat16."""
        return self.hidden[0].dtype == torch.bfloat16

    @property
    def _rows(self) -> Tensor:
        return self.logits[0].view(torch.bfloat16 if self._bf16 else torch.float32)

    def dz(self) -> Tensor:
        """(rows, V) gradient, over the student's logits: bfloat16 for such inputs, else fp32."""
        return self._rows[:, : self.logits.shape[-1]]

    def clear_beyond(self) -> None:
        """Zero the columns after the last of a 16-bit dz, which still hold logits.

        oneDNN's AMX products read a row in tiles of 32 columns, and 0 times NaN is NaN.
        """
        vocab = self.logits.shape[-1]
        self._rows[:, vocab : vocab + _AMX_COLUMNS] = 0

    def statistics(
        self,
        layout: Layout,
        label: Tensor | None,
        offset: int,
        out: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._first_pass(layout, label, offset, out)
        if layout.predicted:
            out[layout.names.index("argmax")] += offset
        if group is not None:
            torch.ops.opsd_cpu.merge(
                gathered(out, group), layout.heads, layout.entropy, layout.smoothed, layout.label,
                layout.predicted, layout.kind, out,
            )  # fmt: skip

    def _first_pass(
        self, layout: Layout, label: Tensor | None, offset: int, out: Tensor, *top: Tensor
    ) -> None:
        """Fill `out` (K, rows), and `top`, logits and ids (rows, k), if it is given."""
        heads = self.heads
        torch.ops.opsd_cpu.statistics(
            self.hidden, [x.weight for x in heads[:1] if self.shared] or [x.weight for x in heads],
            [x.bias for x in heads], self.softcaps, self.temperatures,
            label if layout.label else None, offset, layout.entropy, layout.smoothed,
            layout.predicted, heads[0].class_weight, layout.kind, self.logits, out, *top,
            target_column=self.targets, target_logit=self.target_logit,
        )  # fmt: skip

    def largest(self, k: int) -> Largest:
        """The k largest logits of each row, chosen in the pass that makes the log-sum-exp."""
        rows = len(self.hidden[0])
        out = self.logits.new_empty(2, rows)
        logit = out.new_empty(rows, k)
        ids = logit.new_empty(rows, k, dtype=torch.int64)
        self._first_pass(Layout(1, False, False, False, JSD), None, 0, out, logit, ids)
        return Largest(logit, ids, out[1].log())

    def sums(
        self,
        layout: Layout,
        merged: Tensor,
        beta: float,
        clip: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        if self.differentiated and group is None:
            self.has_gradient = True
            both: Tensor = torch.ops.opsd_cpu.divergence_sums_and_gradient(
                self.logits, merged, len(layout.names), self.scale, self.softcaps[0],
                self.temperatures[0], beta, clip, layout.kind, self._bf16,
            )  # fmt: skip
            return both
        sums: Tensor = torch.ops.opsd_cpu.divergence_sums(
            self.logits, merged, len(layout.names), self.softcaps[0], self.temperatures[0], beta,
            clip, layout.kind, self.differentiated,
        )  # fmt: skip
        if group is not None:
            dist.all_reduce(sums, group=group)
        return sums

    def divergence_gradient(
        self,
        layout: Layout,
        merged: Tensor,
        sum_share: Tensor,
        scale: Tensor | None,
        beta: float,
        clip: float | None,
        columns: slice,
        out: Tensor,
    ) -> None:
        if self.has_gradient:
            return
        kept = layout.kind == JSD or clip is not None
        torch.ops.opsd_cpu.divergence_gradient(
            self.logits, merged, len(layout.names), sum_share, scale, self.softcaps[0],
            self.temperatures[0], beta, layout.kind, kept, self._bf16,
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
        outs: list[Tensor],
    ) -> None:
        if rates is None:
            rates = merged.new_ones(2, merged.shape[1])
        torch.ops.opsd_cpu.logprob_gradient(
            self.logits, merged, label, offset, entropy, *scales, rates, uniform,
            self.heads[0].class_weight, self.softcaps[0], self.temperatures[0],
            self._bf16, outs[1] if len(outs) == 2 else None,
        )  # fmt: skip


def add_target_sums(out: Tensor, factors: Tensor, weight: Tensor, ids: Tensor) -> None:
    """As `blocked_torch.add_target_sums`."""
    if weight.stride(1) == 1 and weight.dtype != torch.float16:
        torch.ops.opsd_cpu.target_sums(factors, weight, ids, out)
    else:
        blocked_torch.add_target_sums(out, factors, weight, ids)


def topk(p: TopkProblem, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k), lse (N,)) of the k largest logits."""
    run = _Pass(p.head, plan, p.keep, GradsNeeded(), p.execution.group_name, None)
    k, blocks = min(p.k, len(p.head.weight)), run.blocks()
    return topk_of(run, p, (run.tiles([p.head], x, False, False).largest(k) for x in blocks))


divergence = functools.partial(two_pass.divergence, _Pass)
logprob = functools.partial(two_pass.logprob, _Pass)
