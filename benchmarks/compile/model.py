"""Predicts how long a call takes on a GPU, from shapes, bytes and instructions. Nothing measured.

A phase takes the longer of its bytes at the rate of a copy and its instructions at the rate of
issue; a product the longer of its arithmetic and its bytes (`gpus.Gpu.product`). Phases follow each
other. `predict` gives them for a plan.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.compile.gpus import GPUS, LAUNCH, Gpu
from benchmarks.environment import ROOT
from opsd_kernels import Plan
from opsd_kernels.backends import triton_config

COUNTS = ROOT / "benchmarks" / "results" / "instructions.json"
TARGETS = {gpu.target for gpu in GPUS.values()}
_BF16, _FP32 = 2, 4
_KERNELS = {
    ("divergence", "statistics"): "statistics_pair",
    ("divergence", "sums"): "divergence_sums",
    ("divergence", "gradient"): "divergence_gradient",
    ("logprob", "statistics"): "statistics",
    ("logprob", "gradient"): "logprob_gradient",
}


def predict(plan: Plan, gpu: str, *, kind: str = "jsd", shared: bool = True) -> dict[str, float]:
    """Milliseconds of each phase of a call in bf16 whose loss is reduced to a scalar.

    `gpu` is "H100" or "A100"; `kind` of a divergence is "jsd", "forward kl" or "reverse kl";
    `shared` says that student and teacher pass the same head. Phases are named after the products
    ("logits", "dh", "dw") and kernels ("statistics", "sums", "gradient") in them.
    """
    call = _Call(plan, GPUS[gpu], kind, shared)
    seconds: Counter[str] = Counter()
    for rows, times in call.blocks():
        for phase, each in call.block(rows):
            seconds[phase] += times * each
    seconds["backward"] += call.backward()
    return {phase: 1e3 * s for phase, s in seconds.items()}


def floor(plan: Plan, gpu: str) -> float:
    """Milliseconds of the bare products: logits of each head, dh, and dw of a trained head."""
    g, n, d, v = GPUS[gpu], plan.num_tokens, plan.hidden_size, plan.vocab_size
    products = [(n, v, d)] * (2 if plan.loss == "divergence" else 1) + [(n, d, v)]
    if plan.accumulator_bytes:
        products.append((v, d, n))
    return 1e3 * sum(
        g.product(a, b, inner, _BF16 * (a * inner + inner * b + a * b)) for a, b, inner in products
    )


def counts(kernels: list[dict[str, Any]], triton: str) -> dict[str, Any]:
    """The file the model reads: what that version of Triton made of the kernels."""
    found = [
        {
            "target": k["target"],
            "kernel": k["kernel"].removeprefix("row_"),
            "case": k["case"],
            "all": k["instructions"]["all"],
            "special": k["instructions"]["special"],
            "registers": k["registers"],
            "blocks_per_processor": k["blocks_per_processor"],
        }
        for k in kernels
        if k["instructions"]
    ]
    return {"triton": triton, "kernels": found}


class _Call:
    """One call on one GPU: seconds of its phases, block by block."""

    def __init__(self, plan: Plan, gpu: Gpu, kind: str, shared: bool) -> None:
        self.plan, self.gpu, self.kind, self.shared = plan, gpu, kind, shared
        self.heads = 2 if plan.loss == "divergence" else 1
        self.trained = plan.accumulator_bytes > 0
        self.streaming = plan.schedule == "streaming"
        # Of both logits as 16-bit differences; the plan of a version without them has no such name.
        self.difference = getattr(plan, "precision", "") == "difference"
        self.device = triton_config.Device(divmod(gpu.target, 10), gpu.processors)

    def blocks(self) -> list[tuple[int, int]]:
        """(rows, how many such blocks)."""
        n, rows = self.plan.num_tokens, self.plan.rows_per_block
        whole = [(rows, n // rows)] if n >= rows else []
        return whole + ([(n % rows, 1)] if n % rows else [])

    def block(self, rows: int) -> Iterator[tuple[str, float]]:
        """Phases of one block of rows."""
        if self.streaming:
            yield from self._streaming(rows)
        elif self.plan.schedule == "tiled":
            yield from self._tiled(rows)
        else:
            yield from self._blocked(rows)

    def backward(self) -> float:
        """Gradients read and written once more: scaled, and cast to bf16."""
        p = self.plan
        size = p.num_tokens * p.hidden_size * 2 * _BF16
        size += p.accumulator_bytes * (1 + _BF16 / _FP32)
        return self.gpu.moving(size) + LAUNCH

    # ------------------------------------------------------------------------------- schedules

    def _blocked(self, rows: int) -> Iterator[tuple[str, float]]:
        v = self.plan.vocab_size
        # Difference coding: fp32 logits live in L2, a slice at a time, and 2 bytes of each head
        # are kept of them.
        each = _BF16 if self.difference else _FP32
        slices = self._slices() if self.difference else [(v, 1)]
        for columns, times in slices:
            yield "logits", times * self._logits(rows, columns, in_cache=self.difference)
            written = self.heads * rows * columns * each if self.difference else 0
            read = 0 if self.difference else self.heads * rows * columns * each
            yield "statistics", times * self._rows("statistics", rows * columns, read + written)
        read = self.heads * rows * v * each
        if self._sums():
            yield "sums", self._rows("sums", rows * v, read)
        for columns, times in [(v, 1)] if self.difference else self._slices():
            pairs = rows * columns
            moved = pairs * (self.heads * each + _BF16)
            yield "gradient", times * self._rows("gradient", pairs, moved)
            yield from self._products(rows, columns, times, adds=columns < v)

    def _tiled(self, rows: int) -> Iterator[tuple[str, float]]:
        """Logits of rows by columns at a time, made anew in every pass."""
        p = self.plan
        # A frozen JSD multiplies its shares and the student's probabilities in one product, since
        # the sum of shares is known only at the end.
        stacked = 2 if self._sums() and not self.trained else 1
        gradients = stacked + self.trained
        looks = (p.gemms - gradients) // self.heads
        for columns, times in self._slices():
            pairs = rows * columns
            size = self.heads * pairs * _FP32
            inside = size <= self.gpu.l2_bytes
            read = 0 if inside else size
            yield "logits", times * looks * self._logits(rows, columns, in_cache=inside)
            yield "statistics", times * self._rows("statistics", pairs, read)
            if looks > 2:
                yield "sums", times * (looks - 2) * self._rows("sums", pairs, read)
            written = 0 if inside else stacked * pairs * _BF16
            yield "gradient", times * self._rows("gradient", pairs, read + written)
            yield from self._products(stacked * rows, columns, times, adds=True, in_cache=inside)

    def _streaming(self, rows: int) -> Iterator[tuple[str, float]]:
        """Tiles of logits multiplied where they are used; only slices of dz reach memory."""
        v = self.plan.vocab_size
        yield "statistics", self._fused("statistics", rows, v)
        if self._sums():
            yield "sums", self._fused("sums", rows, v)
        for columns, times in self._slices():
            yield "gradient", times * self._fused("gradient", rows, columns)
            yield from self._products(rows, columns, times, adds=True)

    # ---------------------------------------------------------------------------------- phases

    def _sums(self) -> bool:
        return self.heads == 2 and self.kind == "jsd"

    def _slices(self) -> list[tuple[int, int]]:
        """(columns, how many such slices of the vocabulary)."""
        v, columns = self.plan.vocab_size, self.plan.slice_columns
        return [(columns, v // columns)] + ([(v % columns, 1)] if v % columns else [])

    def _logits(self, rows: int, columns: int, in_cache: bool) -> float:
        """Logits of every head; `in_cache` where they are read before they reach memory."""
        d, heads, times = self.plan.hidden_size, self.heads, 1
        if not self.shared:
            heads, times = 1, self.heads
        moved = _BF16 * d * (heads * rows + columns)
        moved += 0 if in_cache else _FP32 * heads * rows * columns
        return times * (self.gpu.product(heads * rows, columns, d, moved) + LAUNCH)

    def _rows(self, phase: str, pairs: int, moved: float) -> float:
        """A row kernel over logits in memory or in L2."""
        found = self._count(phase)
        issue = self.gpu.computing(pairs, found["all"], found["special"])
        merge = LAUNCH if phase == "statistics" else 0.0
        return max(issue, self.gpu.moving(moved)) + LAUNCH + merge

    def _products(
        self, rows: int, columns: int, times: int, *, adds: bool, in_cache: bool = False
    ) -> Iterator[tuple[str, float]]:
        """dh and dw of a slice of dz; `adds` to what dh has, `in_cache` where dz still is."""
        d = self.plan.hidden_size
        dz = 0 if in_cache else _BF16 * rows * columns
        moved = dz + _BF16 * columns * d + _FP32 * rows * d * (1 + adds)
        yield "dh", times * (self.gpu.product(rows, d, columns, moved) + LAUNCH)
        if self.trained:
            moved = dz + _BF16 * rows * d + _FP32 * columns * d * 2
            yield "dw", times * (self.gpu.product(columns, d, rows, moved) + LAUNCH)

    def _fused(self, phase: str, rows: int, columns: int) -> float:
        """A kernel that multiplies its own tiles: tensor cores at cuBLAS' rate, or as fed by L2."""
        g, d = self.gpu, self.plan.hidden_size
        tile = triton_config.blocks(
            fused=True, pair=self.heads == 2, depths=[d], itemsize=_BF16, aligned=True,
            vocab_size=self.plan.vocab_size, device=self.device,
        )  # fmt: skip
        down, across = math.ceil(rows / tile.rows), math.ceil(columns / tile.cols)
        weights = 1 if self.shared else self.heads
        fed = 2 * d * (self.heads * tile.rows + weights * tile.cols) * down * across / g.l2
        found = self._count(phase)
        at_once = g.processors * found["blocks_per_processor"]
        full = math.ceil(down * across / at_once) * at_once / (down * across)
        arithmetic = self.heads * 2 * rows * columns * d / g.flops * full
        # A band of row blocks finds the head in L2; the next band reads it again.
        bands = math.ceil(down / 8)
        read = g.moving(bands * weights * 2 * columns * d)
        issue = g.computing(rows * columns, found["all"], found["special"])
        product = max(arithmetic, fed, read)
        # One program to a processor multiplies and computes in turns.
        alone = found["blocks_per_processor"] == 1
        return (product + issue if alone else max(product, issue)) + LAUNCH

    def _count(self, phase: str) -> dict[str, float]:
        """Instructions of the phase's kernel, as compiled last."""
        kernel = _KERNELS[self.plan.loss, phase]
        schedule = "streaming" if self.streaming else "blocked"
        wanted = {schedule, *([self.kind] if self.heads == 2 else [])}
        found = [
            (k, set(k["case"].split(", ")))
            for k in counted()["kernels"]
            if k["target"] == self.gpu.target and k["kernel"] == kernel
        ]
        found = [(k, words) for k, words in found if wanted <= words]
        if not found:
            raise KeyError(f"{COUNTS}: no {kernel} of {', '.join(sorted(wanted))}; count again")
        # Distinct heads are counted for the JSD alone, and `blocked` has the same kernels for both.
        nearest = functools.partial(_likeness, shared=self.shared, difference=self.difference)
        return max(found, key=lambda pair: nearest(pair[1]))[0]


def _likeness(words: set[str], shared: bool, difference: bool) -> int:
    return (("shared" in words) == shared) + (("difference" in words) == difference)


@functools.cache
def counted() -> dict[str, Any]:
    """What `counts` wrote last."""
    return json.loads(COUNTS.read_text())
