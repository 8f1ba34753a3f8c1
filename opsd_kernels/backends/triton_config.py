"""Block sizes of the Triton kernels: plain functions of shapes, dtype and device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Bytes of shared memory one program may use, by compute capability.
_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (12, 0): 99, (12, 1): 99}
_SHARED_MEMORY_ELSE = 227
# Programs per processor: so many that the last wave costs a few percent, so few that the partial
# results stay small.
_WAVES = 16


@dataclass(frozen=True)
class Blocks:
    """A fused kernel's tile and how it is compiled."""

    rows: int  # BLOCK_N
    cols: int  # BLOCK_V
    inner: int  # BLOCK_D, a step of the product
    warps: int
    stages: int
    parts: int  # PARTS of the columns, whose row math runs one after the other


@dataclass(frozen=True)
class RowBlocks:
    """How a kernel walks a row of stored logits."""

    columns: int  # BLOCK_V
    warps: int
    lanes: int  # LANES, columns that one thread loads together


@dataclass(frozen=True)
class ResidentBlocks:
    """How the resident kernel cuts up a row and how it is compiled."""

    columns: int  # BLOCK_V, of a program's part
    warps: int
    programs: int  # per processor
    options: dict[str, object]  # of the launch


@dataclass(frozen=True)
class Device:
    """What block sizes depend on; capability is None under Triton's interpreter."""

    capability: tuple[int, int] | None
    processors: int


@functools.cache
def device_of(index: int | None) -> Device:
    """What the block sizes depend on: capability and multiprocessors; None: the interpreter."""
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
    """Tile of a fused kernel of one head or a pair, whose hidden sizes are `depths`.

    Tiles are as large as registers allow (benchmarks/results/compile.json).
    """
    if device.capability is None:  # small, so that small tests have several tiles
        return Blocks(16, 64, 16, 1, 1, 2)
    old = device.capability[0] < 9
    if itemsize == 4:
        rows, cols, inner = 64, 64, 16
    elif not aligned or (old and any(depth % 64 for depth in depths)):
        rows, cols, inner = 64, 64, 32  # narrow loads and masks need registers
    elif old:
        rows, cols, inner = 64 if pair else 128, 128, 64
    else:
        rows, cols, inner = 128, 128 if pair else 256, 64
    inner = min(inner, _power_of_two(max(depths), 16))
    stage = (rows * (2 if pair else 1) + cols) * inner * itemsize
    limit = _SHARED_MEMORY.get(device.capability, _SHARED_MEMORY_ELSE) * 1024
    return Blocks(rows, cols, inner, 8, max(2, min(3, limit // stage)), cols // 32)


def row_blocks(columns: int, device: Device) -> RowBlocks:
    """Columns that a program of a row kernel loads at a time: 8 of each head per thread."""
    if device.capability is None:
        return RowBlocks(128, 1, 16)
    block = min(2048, _power_of_two(columns, 256))
    return RowBlocks(block, block // 256, block // 8)


def resident_blocks(columns: int, device: Device) -> ResidentBlocks:
    """The part of a row that a program holds in registers: 32 columns of each head per thread."""
    if device.capability is None:  # programs run one after the other: none may wait
        return ResidentBlocks(_power_of_two(columns, 128), 1, 16, {})
    block = min(4096, _power_of_two(columns, 1024))
    # 384 threads with 168 registers fill a processor; all programs must run at once.
    how: dict[str, object] = {"maxnreg": 168, "launch_cooperative_grid": True}
    return ResidentBlocks(block, block // 1024, 3 * 4096 // block, how)


def spans(
    rows: int, columns: int, row_tile: int, column_tile: int, device: Device
) -> tuple[int, int]:
    """(span, splits) of a pass over the vocabulary: tiles per program, programs per row block."""
    row_blocks, tiles = -(-rows // row_tile), -(-columns // column_tile)
    span = max(1, row_blocks * tiles // (_WAVES * device.processors))
    span = min(span, tiles)
    return span, -(-tiles // span)


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (max(size, 1) - 1).bit_length())
