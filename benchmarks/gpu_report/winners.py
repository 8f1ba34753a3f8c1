"""Tiles other than the launcher's own, for the sweeps and for the second command.

The one place that knows how the launcher chooses its blocks: `triton_launch.blocks`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

# What a winner may set of a row kernel's blocks, and of the fused kernels' for a pair of heads.
Chosen = Mapping[str, Mapping[str, int]]


@contextmanager
def tiles(chosen: Chosen) -> Iterator[None]:
    """Launches take what `chosen` says under "row" and "streaming", their own where it is silent.

    "row" has cols and warps of the row kernels; "streaming" has rows, cols, inner, warps, stages
    and parts of the fused kernels of two heads in 16 bits, which it was measured with.
    """
    if not (chosen.get("row") or chosen.get("streaming")) or not importlib.util.find_spec("triton"):
        yield
        return
    from opsd_kernels.backends import triton_launch

    own = triton_launch.blocks

    def blocks(**how: Any) -> Any:
        found = own(**how)
        if how["fused"]:
            # Small heads and rows that do not start at whole 16 bytes keep tiles of their own.
            fits = how["pair"] and how["itemsize"] == 2 and how["aligned"]
            change = chosen.get("streaming") if fits else None
        else:
            change = chosen.get("row")
            if change and change["cols"] > how["vocab_size"]:
                change = None
        return dataclasses.replace(found, **change) if change else found

    with mock.patch.object(triton_launch, "blocks", blocks):
        yield
