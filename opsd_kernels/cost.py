"""Predicted time of a layout on a GPU, from which the plan chooses; not a measurement.

A product takes the longer of its arithmetic and its memory traffic, a pass over the logits the
longer of its bytes and its instructions. The constants are those of an H100: bf16 products at 790
TFLOP/s, fp32 at 52, copies at 3.0 TB/s. On other GPUs only their ratios matter, since layouts are
compared on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

_FLOPS = {2: 790e12, 4: 52e12, 8: 52e12}  # per second, by bytes of an element
_BANDWIDTH = 3.0e12  # bytes per second
PROCESSORS = 132
# One instruction for each pair of logits, by 4 schedulers a processor at 1.755 GHz.
_INSTRUCTION = 1 / (PROCESSORS * 4 * 32 * 1.755e9)
# Efficiency of a product inside a Triton kernel: its tiles are smaller than cuBLAS'.
FUSED = 0.6
# Assumed: each of a slice's two kernels starts 2 us after the one before, and no slice is faster
# than the host, which took 200 us and more for one on an H100 in a virtual machine.
_STARTS, _HOST = 4e-6, 200e-6
_TILES = ((128, 256), (256, 128), (192, 192))  # of cuBLAS' products
CACHE = 36 * 2**20  # bytes of L2 that a buffer may take
# On an H100 row kernels were as fast over slices of 37 MiB of logits, which fill a wave, as of 31.
_FOUND = 38 * 2**20
# Rate at which a slice's products read a head, relative to a copy, if they wait for it: fitted to
# an H100's time for blocks of 192 rows.
HEAD_RATE = 0.7


@dataclass(frozen=True)
class Products:
    """Number of products of 2 N D V operations in one call, by what they compute."""

    logits: int
    dh: int
    dw: int

    @property
    def total(self) -> int:
        """All products, in units of 2 N D V operations."""
        return self.logits + self.dh + self.dw


@dataclass(frozen=True)
class Pass:
    """Bytes moved and instructions run by one pass, per pair of logits (or single logit)."""

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
    head_rate: float = 1.0,
) -> float:
    """Predicted seconds of `blocks` equal blocks of rows.

    efficiency is the rate of a product of logits relative to the best; stored_bytes is what it
    writes to memory per logit; slices is the number of vocabulary slices that a block visits;
    head_rate is the rate of reading the head relative to a copy.
    """
    tokens, depth, vocab = shape
    rows = tokens / blocks
    flops = 2 * rows * depth * vocab / _FLOPS[itemsize]
    head = vocab * depth * itemsize / (_BANDWIDTH * head_rate)
    logits = max(flops / efficiency, head + rows * vocab * stored_bytes / _BANDWIDTH)
    dh = max(flops, head)
    # Every block reads and writes the head's gradient in fp32; a quarter of that is hidden.
    dw = flops + 0.75 * 8 * vocab * depth / _BANDWIDTH
    over = sum(max(p.bytes / _BANDWIDTH, p.instructions * _INSTRUCTION) for p in passes)
    found = products.logits * logits + products.dh * dh + products.dw * dw
    found += over * rows * vocab + slices * _STARTS
    return blocks * max(found, slices * _HOST)


def waves(rows: int, columns: int, processors: int) -> float:
    """Fraction of the processors that a product of that size keeps busy in its waves of tiles."""
    return max(_filled(rows, columns, *tile, processors) for tile in _TILES)


def _filled(rows: int, columns: int, height: int, width: int, processors: int) -> float:
    waves = -(-(-(-rows // height) * -(-columns // width)) // processors)
    return rows * columns / (height * width * waves * processors)


def in_cache(nbytes: int) -> bool:
    """Whether a buffer of that size is still in L2 when the next kernel reads it."""
    return nbytes <= _FOUND
