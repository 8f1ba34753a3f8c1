"""Block sizes of the Triton kernels: a plain function of what is computed and where."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Bytes of shared memory one program may use, by compute capability.
_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (12, 0): 99, (12, 1): 99}
_SHARED_MEMORY_ELSE = 227
# Programs per processor: enough that the last wave is a few percent, few enough partial results.
_WAVES = 16


@dataclass(frozen=True)
class Blocks:
    """Rows and vocabulary columns of a tile, inner size of a product, and how it is compiled."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    parts: int  # of its columns, taken one after the other through the rows' arithmetic


@dataclass(frozen=True)
class Device:
    """What block sizes depend on; capability None is Triton's interpreter."""

    capability: tuple[int, int] | None
    processors: int


@functools.cache
def device_of(index: int | None) -> Device:
    if index is None:
        return Device(None, 1)
    found = torch.cuda.get_device_properties(index)
    return Device((found.major, found.minor), found.multi_processor_count)


def blocks(
    *,
    fused: bool,
    pair: bool,
    depths: list[int],
    itemsize: int,
    aligned: bool,
    vocab_size: int,
    device: Device,
) -> Blocks:
    """Tile of a kernel: `fused` with products over `depths`, of one head or a pair of them.

    Fused tiles are as large as registers allow (benchmarks/results/compile.json).
    """
    if device.capability is None:  # small, so that small tests meet several tiles of each kind
        return Blocks(16, 64, 16, 1, 1, 2) if fused else Blocks(8, 64, 16, 1, 1, 1)
    if not fused:  # one row, as wide as registers hold: 16 elements of each head a thread
        cols = min(4096, _power_of_two(vocab_size, 128))
        return Blocks(1, cols, 16, max(1, min(8, cols // 512)), 1, 1)
    old = device.capability[0] < 9
    if itemsize == 4:
        rows, cols, inner = 64, 64, 16
    elif not aligned or (old and any(depth % 64 for depth in depths)):
        rows, cols, inner = 64, 64, 32  # short loads and masks take the registers
    elif old:
        rows, cols, inner = 64 if pair else 128, 128, 64
    else:
        rows, cols, inner = 128, 128 if pair else 256, 64
    inner = min(inner, _power_of_two(max(depths), 16))
    stage = (rows * (2 if pair else 1) + cols) * inner * itemsize
    limit = _SHARED_MEMORY.get(device.capability, _SHARED_MEMORY_ELSE) * 1024
    return Blocks(rows, cols, inner, 8, max(2, min(3, limit // stage)), cols // 32)


def spans(rows: int, vocab_size: int, b: Blocks, device: Device) -> tuple[int, int]:
    """(tiles a program walks, programs per row block) of a pass over the vocabulary."""
    row_blocks, tiles = -(-rows // b.rows), -(-vocab_size // b.cols)
    span = max(1, row_blocks * tiles // (_WAVES * device.processors))
    span = min(span, tiles)
    return span, -(-tiles // span)


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (max(size, 1) - 1).bit_length())
