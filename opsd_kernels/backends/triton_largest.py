"""The largest logits of each row of a slice of the vocabulary, which a GEMM left in memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels.backends import row_math, triton_rows
from opsd_kernels.backends.largest import Largest, by_size
from opsd_kernels.backends.passes import JSD, Layout
from opsd_kernels.backends.triton_slices import LogitSlice
from opsd_kernels.problem import Head

_LAYOUT = Layout(1, False, False, False, JSD)


def without_epilogue(head: Head) -> Head:
    """The head of the raw products, for `LogitSlice`."""
    return replace(head, bias=None, softcap=None, temperature=1.0)


def largest_logits(
    z: Tensor,  # (rows, padded) raw products, overwritten by the logits
    part: LogitSlice,  # a slice without epilogue, whose logits are in z
    head: Head,
    k: int,
) -> Largest:
    """The k largest logits of the slice, or all."""
    tiles, columns = part.tiles, part.columns
    rows, k = len(z), min(k, part.count)
    # Applied once, since several kernels read the logits.
    bias = None if head.bias is None else head.bias[columns]
    row_math.to_logits_(z[:, : part.count], replace(head, bias=bias), None)
    z[:, part.count :] = -torch.inf
    out = z.new_empty(_LAYOUT.count, rows)
    tiles.statistics(_LAYOUT, None, 0, out, None)
    # The padding too: `topk` copies rows that are not contiguous. Which of equal logits it takes
    # is not said, so only their value is used.
    values = z.topk(k, -1).values
    least = values[:, -1].contiguous()
    ids = torch.empty_like(values, dtype=torch.int64)
    triton_rows.row_largest[(rows,)](
        z, least, (values == least[:, None]).sum(-1), ids, part.count, z.stride(0), k,
        BLOCK_V=tiles.blocks.columns, num_warps=tiles.blocks.warps,
    )  # fmt: skip
    logit, ids = by_size(z, ids)
    # In float64, since slice after slice is merged with those before.
    log_sum = out[1].double().log()
    return Largest(logit.clamp(min=row_math.LOG_ZERO), ids + columns.start, log_sum)
