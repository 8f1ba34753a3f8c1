"""Predict how long a call takes on a GPU, from shapes, bytes and instructions. Nothing is measured.

A phase takes the longer of two times: its bytes at the rate of a copy, its instructions at the rate
of issue. A product takes the longer of its arithmetic and its bytes (`gpus.Gpu.product`). Phases
run one after the other. `predict` returns them for a plan.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.compile.gpus import GPUS, LAUNCH, Gpu
from opsd_kernels import Plan
from opsd_kernels.layouts import even_blocks

COUNTS = Path(__file__).with_name("instructions.json")
TARGETS = {gpu.target for gpu in GPUS.values()}
_BF16, _FP32 = 2, 4
_BAND = 8  # row blocks of a fused kernel that find the head's tiles in L2 together
_KINDS = {"forward kl", "reverse kl", "jsd"}
# Of an fp32 accumulator's bytes, what its products' arithmetic does not hide: fitted to an H100.
_UNHIDDEN = 0.75
# Programs of one warp, as kernels on differences have them, take so much longer than either bound,
# and so many seconds more to start: fitted to an H100's times.
_WAITING, _STARTING = 1.35, 5e-6
# Programs of a row kernel over a slice start and end unevenly: fitted to an H100's times.
_UNEVEN = 9e-6
# Programs that read and compute in turns also wait: fitted to a block of 355 µs on an H100.
_TURNS = 1.14
# Merging the statistics that slices have of a block's rows: fitted to an H100's times.
_MERGING = 25e-6
_DIVERGENCE = {
    "statistics": "statistics_pair", "sums": "divergence_sums", "gradient": "divergence_gradient",
}  # fmt: skip
_DIFFERENCE = {phase: f"difference_{phase}" for phase in _DIVERGENCE}
_LOGPROB = {"statistics": "statistics", "gradient": "logprob_gradient"}


def predict(plan: Plan, gpu: str, *, kind: str = "jsd", shared: bool = True) -> dict[str, float]:
    """Milliseconds of each phase of a call in bf16 whose loss is reduced to a scalar.

    `gpu` is a name of `GPUS`; `kind` of a divergence is "jsd", "forward kl" or "reverse kl";
    `shared` says that student and teacher pass the same head. Phases are named after the products
    ("logits", "dh", "dw") and kernels ("rows", which are all in one, or "statistics", "sums" and
    "gradient") in them.
    """
    call = _Call(plan, GPUS[gpu], kind, shared)
    seconds: Counter[str] = Counter()
    for i, rows in enumerate(even_blocks(plan.num_tokens, plan.rows_per_block)):
        for phase, each in call.block(rows, i == 0):
            seconds[phase] += each
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
            "blocks": [int(n) for n in k["blocks"].split("x")],
            "all": k["instructions"]["all"],
            "special": k["instructions"]["special"],
            "registers": k["registers"],
            "blocks_per_processor": k["blocks_per_processor"],
            "product": k["product"],
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
        self.sums = self.heads == 2 and kind == "jsd"

    def block(self, rows: int, first: bool) -> Iterator[tuple[str, float]]:
        """Phases of one block of rows; dw of the first is added to nothing."""
        if self.plan.schedule == "streaming":
            yield from self._streaming(rows, first)
        elif self.plan.schedule == "tiled":
            yield from self._tiled(rows, first)
        elif self.plan.precision == "difference":
            yield from self._differences(rows, first)
        else:
            yield from self._blocked(rows, first)

    def backward(self) -> float:
        """Gradients read and written once more: scaled, and cast to bf16."""
        p = self.plan
        size = p.num_tokens * p.hidden_size * 2 * _BF16
        size += p.accumulator_bytes * (1 + _BF16 / _FP32)
        return self.gpu.moving(size) + LAUNCH

    # ------------------------------------------------------------------------------- schedules

    def _blocked(self, rows: int, first: bool) -> Iterator[tuple[str, float]]:
        """fp32 logits of whole rows, in memory."""
        v = self.plan.vocab_size
        yield "logits", self._logits(rows, v, in_cache=False)
        if self.heads == 2:
            yield "rows", self._resident(rows)
        else:
            read = self.heads * _FP32
            found = self._rows(_LOGPROB["statistics"], rows * v, read)
            yield "statistics", found + LAUNCH  # a merge
            yield "gradient", self._rows(_LOGPROB["gradient"], rows * v, read + _BF16)
        yield from self._products(rows, v, 1, first, adds=False)

    def _differences(self, rows: int, first: bool) -> Iterator[tuple[str, float]]:
        """fp32 logits of a slice stay in L2; two 16-bit numbers a pair are kept of them."""
        v, kept = self.plan.vocab_size, 2 * _BF16
        for columns, times in self._slices():
            yield "logits", times * self._logits(rows, columns, in_cache=True)
            written = _WAITING * self._rows(_DIFFERENCE["statistics"], rows * columns, kept)
            yield "statistics", times * (written + _STARTING)
        yield "statistics", _MERGING
        if self.sums or self.kind == "reverse kl":  # its value as rounded logits have it
            yield "sums", _WAITING * self._rows(_DIFFERENCE["sums"], rows * v, kept)
        yield "gradient", _WAITING * self._rows(_DIFFERENCE["gradient"], rows * v, kept + _BF16)
        yield from self._products(rows, v, 1, first, adds=False)

    def _tiled(self, rows: int, first: bool) -> Iterator[tuple[str, float]]:
        """Logits of rows by columns, multiplied anew in every pass; in L2 where they fit."""
        p, kernels = self.plan, _DIVERGENCE if self.heads == 2 else _LOGPROB
        # A frozen JSD makes its sums and its gradient in one pass: it multiplies shares and
        # probabilities by the head, and puts them together when the sum of shares is known.
        joined = self.sums and not self.trained
        looks = (p.gemms - (2 if joined else 1) - self.trained) // self.heads
        for columns, times in self._slices():
            pairs, size = rows * columns, self.heads * rows * columns * _FP32
            inside = size <= self.gpu.l2_bytes
            read = 0 if inside else self.heads * _FP32
            yield "logits", times * looks * self._logits(rows, columns, in_cache=inside)
            # What centers the shares of a joined pass is the reverse KL.
            kind = "reverse kl" if joined else self.kind
            found = self._rows(kernels["statistics"], pairs, read, kind)
            yield "statistics", times * (found + _UNEVEN)
            if joined:
                written = 0 if inside else 2 * _BF16
                found = self._rows("jsd_shares", pairs, read + written)
            else:
                if looks > 2:
                    sums = self._rows(kernels["sums"], pairs, read)
                    yield "sums", times * (sums + _UNEVEN)
                written = 0 if inside else _BF16
                found = self._rows(kernels["gradient"], pairs, read + written)
            yield "gradient", times * (found + _UNEVEN)
            height = 2 * rows if joined else rows
            yield from self._products(height, columns, times, first, adds=True, in_cache=inside)
        yield "statistics", _MERGING

    def _streaming(self, rows: int, first: bool) -> Iterator[tuple[str, float]]:
        """Tiles of logits multiplied where they are used; only slices of dz reach memory."""
        v = self.plan.vocab_size
        kernels = _DIVERGENCE if self.heads == 2 else _LOGPROB
        yield "statistics", self._fused(kernels["statistics"], rows, v) + LAUNCH
        if self.sums:
            yield "sums", self._fused(kernels["sums"], rows, v)
        for columns, times in self._slices():
            yield "gradient", times * self._fused(kernels["gradient"], rows, columns)
            yield from self._products(rows, columns, times, first, adds=True)

    # ---------------------------------------------------------------------------------- phases

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

    def _rows(self, kernel: str, pairs: int, moved: int, kind: str | None = None) -> float:
        """A row kernel that moves so many bytes of memory a pair; of another `kind` than the call's
        where a schedule needs it."""
        found = self._count(kernel, "blocked", kind or self.kind)
        issue = self.gpu.computing(pairs, found["all"], found["special"])
        return max(issue, self.gpu.moving(pairs * moved)) + LAUNCH

    def _resident(self, rows: int) -> float:
        """Everything between a block's logits and its dz: the programs of a row read and compute in
        turns, so times add up."""
        found = self._count("resident_divergence", "blocked", self.kind)
        pairs = rows * self.plan.vocab_size
        moving = self.gpu.moving(pairs * (self.heads * _FP32 + _BF16))
        computing = self.gpu.computing(pairs, found["all"], found["special"])
        return _TURNS * (moving + computing) + 2 * LAUNCH

    def _products(
        self, rows: int, columns: int, times: int, first: bool, *, adds: bool,
        in_cache: bool = False,
    ) -> Iterator[tuple[str, float]]:  # fmt: skip
        """dh and dw of a slice of dz; `adds` to what dh has, `in_cache` where dz still is."""
        d = self.plan.hidden_size
        dz = 0 if in_cache else _BF16 * rows * columns
        moved = dz + _BF16 * columns * d + _FP32 * rows * d * (1 + adds)
        yield "dh", times * (self.gpu.product(rows, d, columns, moved) + LAUNCH)
        if self.trained:
            accumulator = self.gpu.moving(_FP32 * columns * d * (1 if first else 2))
            each = self.gpu.product(columns, d, rows, dz + _BF16 * rows * d)
            yield "dw", times * (each + _UNHIDDEN * accumulator + LAUNCH)

    def _fused(self, kernel: str, rows: int, columns: int) -> float:
        """A kernel that multiplies its own tiles: tensor cores at cuBLAS' rate, or as fed by L2."""
        g, d = self.gpu, self.plan.hidden_size
        found = self._count(kernel, "streaming", self.kind)
        tile_rows, tile_columns, _ = found["blocks"]
        down, across = math.ceil(rows / tile_rows), math.ceil(columns / tile_columns)
        weights = 1 if self.shared else self.heads
        operands = _BF16 * d * (self.heads * tile_rows + weights * tile_columns)
        at_once = g.processors * found["blocks_per_processor"]
        full = math.ceil(down * across / at_once) * at_once / (down * across)
        arithmetic = self.heads * 2 * rows * columns * d / g.flops * full
        # A band of row blocks finds the head in L2; the next band reads it again.
        read = math.ceil(down / _BAND) * weights * _BF16 * columns * d
        product = max(arithmetic, operands * down * across / g.l2, g.moving(read))
        issue = g.computing(rows * columns, found["all"], found["special"])
        # One program to a processor multiplies and computes in turns.
        alone = found["blocks_per_processor"] == 1
        return (product + issue if alone else max(product, issue)) + LAUNCH

    def _count(self, kernel: str, schedule: str, kind: str) -> dict[str, Any]:
        """The kernel's instructions, as compiled last; distinct heads are counted for the JSD."""

        def serves(words: list[str]) -> bool:
            return words[0] == schedule and (kind in words or not _KINDS & set(words))

        found = [
            k
            for k in counted()["kernels"]
            if (k["target"], k["kernel"]) == (self.gpu.target, kernel)
            and serves(k["case"].split(", "))
        ]
        if not found:
            raise KeyError(f"{COUNTS}: no {schedule} {kernel} of {kind}; count again")
        return max(found, key=lambda k: ("shared" in k["case"].split(", ")) == self.shared)


@functools.cache
def counted() -> dict[str, Any]:
    """What `counts` wrote last."""
    return json.loads(COUNTS.read_text())
