"""The device's limits: copy bandwidth, a large product, and cuBLAS at the products of `blocked`.

The products decide rows per block, fp32 or bf16 output, and whether to split the dh product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report.job import GpuJob, deal
from benchmarks.gpu_report.timing import median_ms
from benchmarks.gpu_report.work import one_by_one
from benchmarks.losses.cases import QWEN3_8B, TINY

_REPEATS = 10
# Bytes of the copy; side of the square product.
_COPY, _SQUARE = 2**31, 8192
_SMALL_COPY, _SMALL_SQUARE = 2**20, 64
_LOGITS_ROWS = (128, 256, 384, 512, 768, 1024, 3533)
_BLOCK_ROWS = 384  # of the dh products
_SLICE = 19200  # an eighth of the vocabulary, in whole tiles
_DW_ROWS = (384, 768, 1152)


def shards(job: GpuJob) -> list[list[str]]:
    """All products in one process."""
    ids = ["copy", "square product"]
    ids += [f"logits {rows} {out}" for rows in _LOGITS_ROWS for out in ("bfloat16", "float32")]
    ids += [f"dh {depth} {add}" for depth in ("slice", "vocabulary") for add in ("new", "add")]
    ids += [f"dW {rows} {add}" for rows in _DW_ROWS for add in ("new", "add")]
    return deal(ids, 1)


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """{"ms"}, with "gb_per_s" (read and written) of the copy, else "shape" and "tflops"."""
    if identifier == "copy":
        return _copy(job)
    kind, *rest = identifier.split()
    shape = TINY if job.small else QWEN3_8B
    hidden, vocab = shape.hidden, shape.vocab
    if kind == "square":
        side = _SMALL_SQUARE if job.small else _SQUARE
        return _product(_normal(job, side, side), _normal(job, side, side), torch.bfloat16)
    if kind == "logits":
        out_dtype = getattr(torch, rest[1])
        return _product(
            _normal(job, int(rest[0]), hidden), _normal(job, vocab, hidden).t(), out_dtype
        )
    add = rest[1] == "add"
    if kind == "dh":
        depth = min(_SLICE, vocab) if rest[0] == "slice" else vocab
        dz, head = _normal(job, _BLOCK_ROWS, depth), _normal(job, depth, hidden)
        return _product(dz, head, torch.float32, add)
    dz, hidden_states = _normal(job, int(rest[0]), vocab), _normal(job, int(rest[0]), hidden)
    return _product(dz.t(), hidden_states, torch.float32, add)


def _copy(job: GpuJob) -> dict[str, Any]:
    size = _SMALL_COPY if job.small else _COPY
    source = torch.randint(256, (size,), dtype=torch.uint8, device=job.device)
    out = torch.empty_like(source)
    ms = median_ms(lambda: out.copy_(source), job.device, _REPEATS)
    return {"ms": ms, "bytes": size, "gb_per_s": 2 * size / ms / 1e6}


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype, add: bool = False) -> dict[str, Any]:
    """Time a @ b of bf16 operands; `add`: the product is added to the output."""
    rows, depth, columns = a.shape[0], *b.shape
    # The CPU, used for a trial only, cannot write a wider dtype.
    wide = {"out_dtype": out_dtype} if a.is_cuda and out_dtype != a.dtype else {}
    out = torch.zeros(rows, columns, device=a.device, dtype=out_dtype if a.is_cuda else a.dtype)

    def product() -> Tensor:
        if add:
            return torch.addmm(out, a, b, out=out, **wide)
        return torch.mm(a, b, out=out, **wide)

    ms = median_ms(product, a.device, _REPEATS)
    operations = 2 * rows * depth * columns
    return {"ms": ms, "shape": [rows, depth, columns], "tflops": operations / ms / 1e9}


def _normal(job: GpuJob, rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns, device=job.device, dtype=torch.bfloat16)
    return x.div_(columns**0.5)


work = one_by_one(run)
