"""The plan of a call: schedule, rows per block, GEMM count and bytes, chosen from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsd_kernels import extension

SCHEDULES = ("auto", "blocked", "streaming")
BACKENDS = ("triton", "cpp", "torch")
PRECISIONS = ("auto", "fp32", "difference")
_MIB = 2**20
# A tile of about 1 MiB fp32 keeps the row arithmetic inside a core's L2 cache.
_TILE_ELEMENTS = 2**18
_TILE_BUFFERS = 6
# Tiles may take a quarter of a small workspace; the logits need the rest.
_TILE_SHARE = 4
# Beyond 256 rows a GEMM gains nothing on a CPU, and the logits start to leave the L3 cache.
_FROZEN_ROWS = 256
# C++: packing a tile of the head pays for so many rows, and more make buffers that the system
# clears anew in every call. Rows not looked at again leave only statistics.
_PACKED_ROWS, _UNSTORED_ROWS = 384, 1024
# On a GPU: fewer rows than this leave a GEMM waiting for the head to be read.
_BUSY_ROWS = 256
_STREAMING_ROWS = 4096
_STREAMING_COLUMNS, _LEAST_COLUMNS = 8192, 1024
# The gradient of a block's logits is made in this many slices of the vocabulary.
_SLICES = 8
_ROW_TILE = 128
_ONE_BLOCK = "all rows fit in one block"


@dataclass(frozen=True)
class Plan:
    """What a call will do. `str(plan)` is a sentence; all sizes are in bytes.

    gemms counts products of 2*N*D*V floating-point operations over forward and backward.
    workspace_bytes is what the call allocates for logits and row tiles;
    tile_rows is how many rows the PyTorch backend works on at a time, slice_columns how much of the
    vocabulary has the gradient of its logits in memory at a time.
    accumulator_bytes is the fp32 gradient of a trained head, kept until backward scales it.
    """

    loss: str
    backend: str
    schedule: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    rows_per_block: int
    num_blocks: int
    tile_rows: int
    slice_columns: int
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
    two_passes: bool = True,
    workspace_bytes: int | None = None,
    schedule: str = "auto",
    precision: str = "auto",
    backend: str | None = None,
) -> Plan:
    """Choose how to compute a loss of `num_tokens` tokens over `vocab_size` logits.

    loss is "divergence" (student and teacher) or "logprob" (one head); `teacher_dtype` defaults
    to `dtype`. `grad_input`, `grad_weight` and `grad_bias` say which gradients are needed,
    `reduced` that the loss is reduced to a scalar inside the call, `entropy_grad` that the entropy
    is differentiated too; `two_passes` that a divergence looks at the logits twice before its
    gradient, as the JSD and a clip do, not the KLs. `workspace_bytes` defaults to 512 MiB on
    a GPU and 256 MiB elsewhere. `precision` is how logits are kept between passes: "auto", "fp32"
    or "difference". `backend` is "triton", "cpp" or "torch"; by default the one that serves this
    device and these dtypes here.

    Raises ValueError for an unknown loss, schedule, precision or backend, and for a workspace too
    small for one row.
    """
    if loss not in ("divergence", "logprob"):
        raise ValueError(f'loss: expected "divergence" or "logprob", got {loss!r}')
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    if workspace_bytes is None:
        workspace_bytes = default_workspace(device)
    if backend is None:
        backend = default_backend(device, dtype, teacher_dtype or dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if schedule == "streaming" and backend != "triton":
        raise ValueError(
            "schedule: 'streaming' needs a CUDA device and inputs of 32 or 16 bits, got "
            f"{dtype} on {device}; use 'blocked' or 'auto'"
        )
    heads = 2 if loss == "divergence" else 1
    trained = grad_weight or grad_bias
    late = trained and not reduced
    entropy_product = entropy_grad and grad_input and not trained
    products = int(grad_input) + int(grad_weight) + int(entropy_product)
    size = _Size(
        num_tokens, hidden_size, vocab_size, heads, dtype.itemsize,
        (teacher_dtype or dtype).itemsize, 1 + int(entropy_product), trained,
        grad_input or trained, workspace_bytes,
    )  # fmt: skip
    if backend == "torch":
        layout = _torch_layout(size)
    elif backend == "cpp":
        layout = _cpp_layout(size, again=size.differentiated or (heads == 2 and two_passes))
    elif schedule == "streaming":
        layout = _streaming_layout(size, "as asked")
    else:
        layout = _triton_layout(size, schedule)
    looks = 1 + int(late)  # at the logits
    if layout.schedule == "streaming":
        before = 1 + int(two_passes and heads == 2)
        looks *= before
        looks += int(bool(products) or grad_bias)
    return Plan(
        loss=loss,
        backend=backend,
        schedule=layout.schedule,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        rows_per_block=layout.rows,
        num_blocks=-(-num_tokens // layout.rows),
        tile_rows=layout.tile_rows,
        slice_columns=layout.slice_columns,
        gemms=heads * looks + products,
        workspace_bytes=layout.workspace_bytes,
        accumulator_bytes=vocab_size * hidden_size * max(dtype.itemsize, 4) if grad_weight else 0,
        reason=layout.reason,
    )


def default_backend(
    device: str | torch.device, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> str:
    """The backend that computes in these dtypes on this device, with what is installed."""
    if torch.device(device).type == "cuda" and dtype != torch.float64:
        return "triton"
    if extension.serves(device, dtype, teacher_dtype):
        return "cpp"
    return "torch"


def default_workspace(device: str | torch.device) -> int:
    """Bytes of workspace where the caller named none."""
    return (512 if torch.device(device).type == "cuda" else 256) * _MIB


@dataclass(frozen=True)
class _Size:
    """What decides a layout."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    heads: int
    itemsize: int
    teacher_itemsize: int
    gradients: int  # of the hidden states: the loss's, and the entropy's
    trained: bool
    differentiated: bool
    budget: int

    def rows(self, limit: int) -> int:
        """Rows of a block when `limit` fit: blocks of nearly equal size."""
        blocks = -(-self.num_tokens // limit)
        return max(1, -(-self.num_tokens // max(1, blocks)))

    def too_small(self, needed: int) -> ValueError:
        return ValueError(
            f"workspace_bytes: {self.budget} is too small for a vocabulary of {self.vocab_size}; "
            f"one row needs {needed}"
        )


@dataclass(frozen=True)
class _Layout:
    schedule: str
    rows: int
    tile_rows: int
    slice_columns: int
    workspace_bytes: int
    reason: str


def _torch_layout(x: _Size) -> _Layout:
    """Blocks of logits in the input dtype, worked on in tiles of fp32."""
    tile_row = _TILE_BUFFERS * x.vocab_size * max(x.itemsize, 4)
    tile_rows = min(_TILE_ELEMENTS // x.vocab_size, x.budget // (_TILE_SHARE * tile_row))
    tile_rows = max(1, tile_rows)
    tiles = tile_rows * tile_row
    per_row = x.gradients * x.vocab_size * x.itemsize
    if x.heads == 2:
        per_row += x.vocab_size * x.teacher_itemsize
    fitting = (x.budget - tiles) // per_row
    if fitting < 1:
        raise x.too_small(tiles + per_row)
    # A trained head adds each block's product to the accumulator: the fewer blocks the better.
    if x.trained or fitting <= _FROZEN_ROWS:
        limit, reason = fitting, f"as many rows as {_size(x.budget)} holds"
    else:
        limit, reason = _FROZEN_ROWS, f"{_FROZEN_ROWS} rows keep a GEMM busy"
    if x.num_tokens <= limit:
        reason = _ONE_BLOCK
    rows = x.rows(limit)
    used = tiles + rows * per_row
    return _Layout("blocked", rows, min(tile_rows, rows), x.vocab_size, used, reason)


def _cpp_layout(x: _Size, again: bool) -> _Layout:
    """fp32 logits of a block, if they are looked at again, and the entropy's own gradient."""
    per_row = (x.gradients - 1) * x.vocab_size * x.itemsize
    if again:
        per_row += x.heads * x.vocab_size * 4
    fitting = x.budget // per_row if per_row else max(1, x.num_tokens)
    if fitting < 1:
        raise x.too_small(per_row)
    # A trained head adds each block's product to the accumulator: the fewer blocks the better.
    wanted = _PACKED_ROWS if again else _UNSTORED_ROWS
    if fitting <= wanted or (x.trained and again):
        limit, reason = fitting, f"as many rows as {_size(x.budget)} holds"
    else:
        limit, reason = wanted, f"{wanted} rows are enough to pack a tile of the head for"
    if x.num_tokens <= limit:
        reason = _ONE_BLOCK
    rows = x.rows(limit)
    return _Layout("blocked", rows, rows, x.vocab_size, rows * per_row, reason)


def _triton_layout(x: _Size, schedule: str) -> _Layout:
    """fp32 logits of a block and, one slice of the vocabulary at a time, their gradient."""
    columns = min(x.vocab_size, max(_LEAST_COLUMNS, _rounded(-(-x.vocab_size // _SLICES))))
    per_row = x.heads * x.vocab_size * 4 + _gradient_bytes(x, columns)
    fitting = x.budget // per_row
    if schedule == "auto" and fitting < min(x.num_tokens, _BUSY_ROWS):
        why = f"{_size(x.budget)} holds the logits of {fitting} rows, a GEMM wants {_BUSY_ROWS}"
        return _streaming_layout(x, why)
    if fitting < 1:
        raise x.too_small(per_row)
    rows, reason = min(x.num_tokens, fitting), f"as many rows as {_size(x.budget)} holds"
    if x.num_tokens <= fitting:
        rows, reason = max(1, x.num_tokens), _ONE_BLOCK
    elif rows >= _ROW_TILE:
        rows -= rows % _ROW_TILE  # whole tiles
    return _Layout("blocked", rows, rows, columns, rows * per_row, reason)


def _streaming_layout(x: _Size, reason: str) -> _Layout:
    """No logits; as wide a slice of their gradient as leaves room for a busy GEMM's rows."""
    columns = min(x.vocab_size, _STREAMING_COLUMNS)
    wanted = min(x.num_tokens, _STREAMING_ROWS)
    while columns > _LEAST_COLUMNS and x.budget // max(1, _gradient_bytes(x, columns)) < wanted:
        columns = max(_LEAST_COLUMNS, columns // 2)
    per_row = _gradient_bytes(x, columns)
    limit = x.budget // per_row if per_row else x.num_tokens
    if limit < 1:
        raise x.too_small(per_row)
    if not x.trained:  # a trained head's accumulator is read and written once a block
        limit = min(limit, _STREAMING_ROWS)
    rows = max(1, min(x.num_tokens, limit))
    if _ROW_TILE <= rows < x.num_tokens:
        rows -= rows % _ROW_TILE
    return _Layout("streaming", rows, rows, columns, rows * per_row, reason)


def _gradient_bytes(x: _Size, columns: int) -> int:
    """One row of a slice of dz, and of dh in fp32."""
    if not x.differentiated:
        return 0
    return x.gradients * (columns * x.itemsize + x.hidden_size * 4)


def _rounded(columns: int) -> int:
    return -(-columns // 256) * 256


def _size(count: int) -> str:
    return f"{count / _MIB:.0f} MiB" if count >= _MIB else f"{count / 1024:.0f} KiB"
