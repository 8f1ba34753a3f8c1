"""Replace the launchers' tiles, for the sweeps and for the second command.

Only this module knows how the launchers choose their blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

# Block sizes by kind of kernel.
Chosen = Mapping[str, Mapping[str, int]]


@contextmanager
def tiles(chosen: Chosen) -> Iterator[None]:
    """Within this context launches use the blocks in `chosen`, and their own for other kinds.

    "row" has columns and warps of the row kernels, "difference" those of the kernels on
    differences; "streaming" has rows, cols, inner, warps, stages and parts of the fused kernels,
    used for two heads in 16 bits only, as in the sweeps.
    """
    row, streaming, difference = (chosen.get(k) for k in ("row", "streaming", "difference"))
    if not (row or streaming or difference):
        yield
        return
    from opsd_kernels import layouts
    from opsd_kernels.backends import (
        triton_differences_launch,
        triton_launch,
        triton_rows_launch,
    )

    own, own_row = triton_launch.blocks, triton_rows_launch.row_blocks

    def blocks(**how: Any) -> Any:
        # Small heads and rows that are not aligned to 16 bytes keep their own tiles.
        fits = streaming and how["pair"] and how["itemsize"] == 2 and how["aligned"]
        return dataclasses.replace(own(**how), **streaming) if fits else own(**how)

    def row_blocks(columns: int, device: Any) -> Any:
        found = own_row(columns, device)
        if not row or row["columns"] > columns:
            return found
        # A lane is a thread with at least 8 columns: 16 bytes of 16-bit logits.
        lanes = min(32 * row["warps"], row["columns"] // 8)
        return dataclasses.replace(found, **row, lanes=lanes)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton_launch, "blocks", blocks))
        patches.enter_context(mock.patch.object(triton_rows_launch, "row_blocks", row_blocks))
        if difference:
            layouts.triton_layout.cache_clear()
            patches.callback(layouts.triton_layout.cache_clear)
            for module in (layouts, triton_differences_launch):
                tile = mock.patch.object(module, "DIFFERENCE_TILE", difference["columns"])
                patches.enter_context(tile)
            warps = mock.patch.object(triton_differences_launch, "_WARPS", difference["warps"])
            patches.enter_context(warps)
        yield
