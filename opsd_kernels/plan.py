"""The plan of a call: schedule, rows per block, GEMM count and bytes, chosen from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCHEDULES = ("auto", "blocked")
_MIB = 2**20
# A tile of about 1 MiB fp32 keeps the row arithmetic inside a core's L2 cache.
_TILE_ELEMENTS = 2**18
_TILE_BUFFERS = 6
# Tiles may take a quarter of a small workspace; the logits need the rest.
_TILE_SHARE = 4
# Beyond 256 rows a GEMM gains nothing on a CPU, and the logits start to leave the L3 cache.
_FROZEN_ROWS = 256


@dataclass(frozen=True)
class Plan:
    """What a call will do. `str(plan)` is a sentence; all sizes are in bytes.

    gemms counts products of 2*N*D*V floating-point operations over forward and backward.
    workspace_bytes is what the call allocates for logits and row tiles;
    accumulator_bytes is the fp32 gradient of a trained head, kept until backward scales it.
    """

    loss: str
    schedule: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    rows_per_block: int
    num_blocks: int
    tile_rows: int
    gemms: int
    workspace_bytes: int
    accumulator_bytes: int
    reason: str

    def __str__(self) -> str:
        gradient = (
            f", plus {_size(self.accumulator_bytes)} for the head's gradient"
            if self.accumulator_bytes
            else ""
        )
        return (
            f"{self.loss} of {self.num_tokens} tokens, hidden size {self.hidden_size}, "
            f"vocabulary {self.vocab_size}: {self.schedule} schedule in {self.num_blocks} block"
            f"{'' if self.num_blocks == 1 else 's'} of up to {self.rows_per_block} rows, "
            f"{self.gemms} GEMM{'' if self.gemms == 1 else 's'}, workspace "
            f"{_size(self.workspace_bytes)}{gradient} ({self.reason})"
        )


def plan(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    loss: str = "divergence",
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    grad_input: bool = True,
    grad_weight: bool = False,
    grad_bias: bool = False,
    reduced: bool = True,
    entropy_grad: bool = False,
    workspace_bytes: int | None = None,
    schedule: str = "auto",
) -> Plan:
    """Choose how to compute a loss of `num_tokens` tokens over `vocab_size` logits.

    loss is "divergence" (student and teacher) or "logprob" (one head); `teacher_dtype` defaults
    to `dtype`. `grad_input`, `grad_weight` and `grad_bias` say which gradients are needed,
    `reduced` that the loss is reduced to a scalar inside the call, `entropy_grad` that the entropy
    is differentiated too. `workspace_bytes` defaults to 512 MiB on a GPU and 256 MiB elsewhere.

    Raises ValueError for an unknown loss or schedule, and for a workspace too small for one row.
    """
    if loss not in ("divergence", "logprob"):
        raise ValueError(f'loss: expected "divergence" or "logprob", got {loss!r}')
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    if workspace_bytes is None:
        workspace_bytes = (512 if torch.device(device).type == "cuda" else 256) * _MIB
    heads = 2 if loss == "divergence" else 1
    tile_item = max(dtype.itemsize, 4)
    tile_row = _TILE_BUFFERS * vocab_size * tile_item
    tile_rows = min(_TILE_ELEMENTS // vocab_size, workspace_bytes // (_TILE_SHARE * tile_row))
    tile_rows = max(1, tile_rows)
    tiles = tile_rows * tile_row
    per_row = (1 + int(entropy_grad)) * vocab_size * dtype.itemsize
    if heads == 2:
        per_row += vocab_size * (teacher_dtype or dtype).itemsize
    fitting = (workspace_bytes - tiles) // per_row
    if fitting < 1:
        raise ValueError(
            f"workspace_bytes: {workspace_bytes} is too small for a vocabulary of {vocab_size}; "
            f"one row needs {tiles + per_row}"
        )
    trained = grad_weight or grad_bias
    # A trained head adds each block's product to the accumulator: the fewer blocks the better.
    if trained or fitting <= _FROZEN_ROWS:
        limit, reason = fitting, f"as many rows as {_size(workspace_bytes)} holds"
    else:
        limit, reason = _FROZEN_ROWS, f"{_FROZEN_ROWS} rows keep a GEMM busy"
    num_blocks = -(-num_tokens // limit)
    rows = max(1, -(-num_tokens // max(1, num_blocks)))
    if num_tokens <= limit:
        reason = "all rows fit in one block"
    return Plan(
        loss=loss,
        schedule="blocked",
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        rows_per_block=rows,
        num_blocks=num_blocks,
        tile_rows=min(tile_rows, rows),
        gemms=_gemms(
            heads,
            int(grad_input) + int(grad_weight),
            recompute=trained and not reduced,
            entropy_product=entropy_grad and grad_input and not trained,
        ),
        workspace_bytes=tiles + rows * per_row,
        accumulator_bytes=vocab_size * hidden_size * tile_item if grad_weight else 0,
        reason=reason,
    )


def _gemms(heads: int, gradients: int, *, recompute: bool, entropy_product: bool) -> int:
    """Logits once per head, one product per gradient; logits again if the upstream comes late."""
    return heads * (1 + int(recompute)) + gradients + int(entropy_product)


def _size(count: int) -> str:
    return f"{count / _MIB:.0f} MiB" if count >= _MIB else f"{count / 1024:.0f} KiB"
