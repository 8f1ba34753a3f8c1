"""Plans: backend, schedule, blocks, number of GEMMs and bytes of a loss, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsd_kernels import extension
from opsd_kernels.cost import PROCESSORS
from opsd_kernels.cpu_layouts import cpp_layout, dz_waits, torch_layout
from opsd_kernels.layouts import MIB, Work, size_in_words, triton_layout

LOSSES = ("divergence", "logprob", "topk")
SCHEDULES = ("auto", "blocked", "tiled", "streaming")
BACKENDS = ("triton", "cpp", "torch")
PRECISIONS = ("auto", "fp32", "difference")


@dataclass(frozen=True)
class Plan:
    """How a loss will be computed. `print(plan)` says it in a sentence."""

    loss: str  # "divergence", "logprob" or "topk"
    backend: str  # of BACKENDS
    schedule: str  # of SCHEDULES, but "auto"
    precision: str  # of logits between passes: "fp32", or "difference" for 16-bit differences
    num_tokens: int
    hidden_size: int
    vocab_size: int
    rows_per_block: int  # tokens whose logits are computed at a time
    num_blocks: int
    tile_rows: int  # rows that the PyTorch backend reduces at a time
    slice_columns: int  # vocabulary entries whose logits, or their gradient, are stored at a time
    widened_rows: int  # rows of a 16-bit head converted to fp32 at a time, 0 if none are
    gemms: int  # products of 2 * N * D * V operations, over forward and backward
    workspace_bytes: int  # for logits and row tiles; on a GPU also for gathered hidden states
    accumulator_bytes: int  # a trained head's fp32 sums, or dz that waits; dh of float16 inputs
    reason: str  # of the rows per block

    def __str__(self) -> str:
        gradient = (
            f", plus {size_in_words(self.accumulator_bytes)} for gradients"
            if self.accumulator_bytes
            else ""
        )
        widened = (
            f" in fp32 (16-bit heads converted {self.widened_rows} rows at a time)"
            if self.widened_rows
            else ""
        )
        kept = ", logits as 16-bit differences" if self.precision == "difference" else ""
        return (
            f"{self.loss} of {self.num_tokens} tokens, hidden size {self.hidden_size}, "
            f"vocabulary {self.vocab_size}: {self.schedule} schedule in {self.num_blocks} block"
            f"{'' if self.num_blocks == 1 else 's'} of up to {self.rows_per_block} rows{kept}, "
            f"{self.gemms} GEMM{'' if self.gemms == 1 else 's'}{widened}, workspace "
            f"{size_in_words(self.workspace_bytes)}{gradient} ({self.reason})"
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
    clipped: bool = False,
    k: int = 0,
    workspace_bytes: int | None = None,
    schedule: str = "auto",
    precision: str = "auto",
    backend: str | None = None,
) -> Plan:
    """Choose how to compute a loss. Every loss calls this; call it to see what a loss will do.

    Args:
        num_tokens, hidden_size, vocab_size: N, D and V.
        loss: "divergence" (student and teacher), "logprob" or "topk" (one head). The last has no
            gradient.
        dtype, teacher_dtype: of the inputs; the teacher's defaults to `dtype`.
        device: a CUDA device need not be present; it is then planned for as an H100.
        grad_input, grad_weight, grad_bias: which gradients are needed.
        reduced: the loss is reduced to a scalar inside the call.
        entropy_grad: the entropy is differentiated too.
        two_passes: a divergence that reads its logits twice before the gradient: a JSD, or with a
            clip.
        clipped: there is a clip.
        k: of "topk".
        workspace_bytes: limit on the memory for logits and other buffers. By default 256 MiB on a
            CPU and 512 MiB on a GPU. A trained head may use as much as its gradient in fp32 takes:
            on a GPU for up to 1,152 rows; on a CPU that multiplies bfloat16 if one block then holds
            all tokens and the loss is not reduced in the call.
        schedule: "blocked" stores the logits of whole rows, "tiled" (GPU) of a slice of the
            vocabulary at a time, "streaming" (GPU) none. "auto" is "blocked" on a CPU, and on a
            GPU the one that `opsd_kernels.cost` predicts to be fastest within the workspace.
        precision: of logits between passes, "fp32" or "difference" (a divergence of 16-bit inputs
            without a clip, on a GPU). "auto" is "fp32": on an H100 differences were slower.
        backend: "triton", "cpp" or "torch"; by default the one for this device and these dtypes.

    Raises:
        ValueError: for an unknown loss, schedule, precision or backend, for one that does not
            support these inputs, and for a workspace too small for one row.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if (loss == "topk") != (k > 0):
        raise ValueError(f'k: expected at least 1 for loss "topk", 0 for others, got {k} of {loss}')
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    if backend is None:
        backend = default_backend(device, dtype, teacher_dtype or dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if schedule in ("tiled", "streaming") and backend != "triton":
        raise ValueError(
            f"schedule: {schedule!r} needs a CUDA device and inputs of 32 or 16 bits, got "
            f"{dtype} on {device}; use 'blocked' or 'auto'"
        )
    if schedule == "streaming" and loss == "topk":
        raise ValueError(
            "schedule: 'streaming' stores no logits to choose the largest from; use 'tiled', "
            "'blocked' or 'auto'"
        )
    if loss == "topk":
        grad_input = grad_weight = grad_bias = False
    work = Work(
        shape=(num_tokens, hidden_size, vocab_size),
        heads=2 if loss == "divergence" else 1,
        itemsizes=(dtype.itemsize, (teacher_dtype or dtype).itemsize),
        grad_hidden=grad_input,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_entropy=entropy_grad and grad_input and not (grad_weight or grad_bias),
        reduced=reduced,
        two_passes=two_passes and loss == "divergence",
        clipped=clipped,
        chosen=k,
        workspace_bytes=workspace_bytes,
        default_bytes=default_workspace(device),
        processors=processors_of(device),
    )
    if precision == "difference" and not (backend == "triton" and work.takes_differences):
        raise ValueError(
            "precision: 'difference' needs a divergence of 16-bit inputs without a clip on a CUDA "
            f"device, got {loss} of {dtype} on {device}; use 'fp32' or 'auto'"
        )
    if precision == "difference" and schedule not in ("auto", "blocked"):
        raise ValueError(
            f"precision: 'difference' is a way of 'blocked', got schedule {schedule!r}; use "
            "schedule 'auto' or precision 'fp32'"
        )
    if backend == "torch":
        layout = torch_layout(work)
    elif backend == "cpp":
        layout = cpp_layout(work, 2 if dtype == torch.bfloat16 else 4, _rounds_once(dtype))
    else:
        layout = triton_layout(work, schedule, precision)
    return Plan(
        loss=loss,
        backend=backend,
        schedule=layout.schedule,
        precision=layout.precision,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        rows_per_block=layout.rows,
        num_blocks=-(-num_tokens // layout.rows),
        tile_rows=layout.tile_rows,
        slice_columns=layout.slice_columns,
        widened_rows=layout.widened_rows,
        gemms=layout.products.total,
        workspace_bytes=layout.workspace_bytes,
        accumulator_bytes=_accumulator_bytes(work, dtype, layout.rows if backend == "cpp" else 0),
        reason=layout.reason,
    )


def _accumulator_bytes(x: Work, dtype: torch.dtype, cpp_rows: int) -> int:
    """Bytes of gradients that are added up, or wait for the last block or for backward.

    cpp_rows: rows in a block of the C++ backend; 0 for another backend.
    """
    tokens, depth, vocab = x.shape
    found = vocab * depth * max(dtype.itemsize, 4) if x.grad_weight else 0
    if cpp_rows and _rounds_once(dtype):
        if tokens <= cpp_rows:
            found = 0  # rounded as it is made
        elif x.grad_weight and dz_waits(tokens, depth):
            found = tokens * vocab * dtype.itemsize
    if x.grad_hidden and dtype == torch.float16:
        found += x.gradients * tokens * depth * 4
    return found


def _rounds_once(dtype: torch.dtype) -> bool:
    """Whether the C++ backend rounds a trained head's gradient as it makes it."""
    return dtype == torch.bfloat16 and extension.multiplies_bf16()


def default_backend(
    device: str | torch.device, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> str:
    """The backend for these dtypes and this device, of those installed."""
    if torch.device(device).type == "cuda" and dtype != torch.float64:
        return "triton"
    if extension.serves(device, dtype, teacher_dtype):
        return "cpp"
    return "torch"


def default_workspace(device: str | torch.device) -> int:
    """Bytes of workspace if the caller gives no limit."""
    return (512 if torch.device(device).type == "cuda" else 256) * MIB


def processors_of(device: str | torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; those of an H100 if it is not present."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS
