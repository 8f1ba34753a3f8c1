"""Predicted time of a schedule on a GPU, to choose among schedules; not a measurement.

A product takes the longer of its arithmetic and its memory traffic, a pass over the logits the
longer of its bytes and its instructions. The constants are an H100's: bf16 products at 790 TFLOP/s,
fp32 at 52, copies at 3.0 TB/s; what a constant cancels from is the choice, which compares schedules
on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

_FLOPS = {2: 790e12, 4: 52e12, 8: 52e12}  # per second, by bytes of an element
_BANDWIDTH = 3.0e12  # bytes per second
PROCESSORS = 132
# One instruction for each pair of logits, by 4 schedulers a processor at 1.755 GHz.
_INSTRUCTION = 1 / (PROCESSORS * 4 * 32 * 1.755e9)
# Efficiency of a product inside a Triton kernel: L2 feeds its smaller tiles less well than cuBLAS'.
FUSED = 0.6
# A slice's two kernels start 2 us after the ones before, assumed; the host took 200 to 420 us to
# launch them, measured beside an H100 in a virtual machine, and no slice is faster.
_STARTS, _HOST = 4e-6, 200e-6
_TILES = ((128, 256), (256, 128), (192, 192))  # of cuBLAS' products
CACHE = 36 * 2**20  # bytes of L2 that a buffer may take


@dataclass(frozen=True)
class Products:
    """Products of one call in units of G = 2 N D V operations, by what they make."""

    logits: int
    dh: int
    dw: int

    @property
    def total(self) -> int:
        return self.logits + self.dh + self.dw


@dataclass(frozen=True)
class Pass:
    """What one pass over the logits moves and runs, for each pair (or single logit)."""

    bytes: float
    instructions: float


def seconds(
    shape: tuple[int, int, int],  # N, D, V
    itemsize: int,
    blocks: int,
    products: Products,
    *,
    passes: list[Pass],
    efficiency: float = 1.0,
    slices: int = 1,
    stored_bytes: float = 0.0,
) -> float:
    """Predicted seconds of `blocks` equal blocks of rows.

    efficiency is the rate of a product of logits beside the best; stored_bytes is what it writes
    for each logit beyond L2; slices counts the slices of the vocabulary that a block visits.
    """
    tokens, depth, vocab = shape
    rows = tokens / blocks
    flops = 2 * rows * depth * vocab / _FLOPS[itemsize]
    head = vocab * depth * itemsize / _BANDWIDTH
    logits = max(flops / efficiency, head + rows * vocab * stored_bytes / _BANDWIDTH)
    dh = max(flops, head)
    # The head's gradient is read and written in fp32 once a block, a quarter of that unseen.
    dw = flops + 0.75 * 8 * vocab * depth / _BANDWIDTH
    over = sum(max(p.bytes / _BANDWIDTH, p.instructions * _INSTRUCTION) for p in passes)
    found = products.logits * logits + products.dh * dh + products.dw * dw
    found += over * rows * vocab + slices * _STARTS
    return blocks * max(found, slices * _HOST)


def waves(rows: int, columns: int, processors: int) -> float:
    """Share of the processors that a product of that size keeps busy in its waves of tiles."""
    return max(_filled(rows, columns, *tile, processors) for tile in _TILES)


def _filled(rows: int, columns: int, height: int, width: int, processors: int) -> float:
    waves = -(-(-(-rows // height) * -(-columns // width)) // processors)
    return rows * columns / (height * width * waves * processors)


def in_cache(nbytes: int) -> bool:
    """Whether a buffer of that size is still in L2 when the next kernel reads it."""
    return nbytes <= CACHE
