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
class RowBlocks:
    """How a kernel walks a row of logits: columns at a time, warps, threads."""

    columns: int
    warps: int
    lanes: int


@dataclass(frozen=True)
class ResidentBlocks:
    """Columns of a program's part of a row, warps, programs a processor, how it is compiled."""

    columns: int
    warps: int
    programs: int
    options: dict[str, object]


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
    pair: bool,
    depths: list[int],
    itemsize: int,
    aligned: bool,
    device: Device,
) -> Blocks:
    """Tile of a fused kernel with products over `depths`, of one head or a pair of them.

    Tiles are as large as registers allow (benchmarks/results/compile.json).
    """
    if device.capability is None:  # small, so that small tests meet several tiles of each kind
        return Blocks(16, 64, 16, 1, 1, 2)
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


def row_blocks(columns: int, device: Device) -> RowBlocks:
    """Columns a program of a row kernel takes at a time: 8 of each head a thread."""
    if device.capability is None:
        return RowBlocks(128, 1, 16)
    block = min(2048, _power_of_two(columns, 256))
    return RowBlocks(block, block // 256, block // 8)


def resident_blocks(columns: int, device: Device) -> ResidentBlocks:
    """The part of a row that a program holds: 32 columns of each head a thread."""
    if device.capability is None:  # its programs run one after the other: none may wait
        return ResidentBlocks(_power_of_two(columns, 128), 1, 16, {})
    block = min(4096, _power_of_two(columns, 1024))
    # 384 threads of 168 registers fill a processor; all programs must run at once.
    how: dict[str, object] = {"maxnreg": 168, "launch_cooperative_grid": True}
    return ResidentBlocks(block, block // 1024, 3 * 4096 // block, how)


def spans(
    rows: int, columns: int, row_tile: int, column_tile: int, device: Device
) -> tuple[int, int]:
    """(tiles a program walks, programs per row block) of a pass over the vocabulary."""
    row_blocks, tiles = -(-rows // row_tile), -(-columns // column_tile)
    span = max(1, row_blocks * tiles // (_WAVES * device.processors))
    span = min(span, tiles)
    return span, -(-tiles // span)


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (max(size, 1) - 1).bit_length())
