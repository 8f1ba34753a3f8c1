"""Kernels for several targets per token: products with single rows of the head, entries of dz."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsd_kernels.problem import Head

_TARGETS, _DEPTH = 16, 128  # of a step
_SUM_TARGETS, _SUM_DEPTH = 8, 256


@triton.jit
def _products(
    hidden, weight,  # (rows, depth) and (cols, depth), rows a stride apart, columns adjacent
    ids,  # (rows, count) int64
    out,  # (rows, count) fp32
    count, cols, depth, hidden_stride, weight_stride,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_id = tl.load(ids + i_n * count + o_k, mask=o_k < count, other=-1)
    has = (b_id >= 0) & (b_id < cols)
    p_w = weight + tl.where(has, b_id, 0)[:, None] * weight_stride
    b_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start_d in range(0, depth, BLOCK_D):
        o_d = start_d + tl.arange(0, BLOCK_D)
        b_h = tl.load(hidden + i_n * hidden_stride + o_d, mask=o_d < depth, other=0.0)
        mask = has[:, None] & (o_d < depth)[None, :]
        b_w = tl.load(p_w + o_d[None, :], mask=mask, other=0.0)
        b_sum += b_w.to(tl.float32) * b_h.to(tl.float32)[None, :]
    tl.store(out + i_n * count + o_k, tl.sum(b_sum, 1), mask=o_k < count)


@triton.jit
def _sums(
    factors,  # (rows, count) fp32
    weight,  # (cols, depth), rows a stride apart, columns adjacent
    ids,  # (rows, count) int64
    out,  # (rows, depth) fp32, added to
    count, cols, depth, weight_stride,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.load(out + i_n * depth + o_d, mask=o_d < depth, other=0.0)
    for start_k in range(0, count, BLOCK_K):
        o_k = start_k + tl.arange(0, BLOCK_K)
        b_id = tl.load(ids + i_n * count + o_k, mask=o_k < count, other=-1)
        has = (b_id >= 0) & (b_id < cols)
        b_factor = tl.load(factors + i_n * count + o_k, mask=has, other=0.0)
        p_w = weight + tl.where(has, b_id, 0)[:, None] * weight_stride + o_d[None, :]
        b_w = tl.load(p_w, mask=has[:, None] & (o_d < depth)[None, :], other=0.0)
        b_sum += tl.sum(b_w.to(tl.float32) * b_factor[:, None], 0)
    tl.store(out + i_n * depth + o_d, b_sum, mask=o_d < depth)


@triton.jit
def _store(
    values,  # (rows, count) fp32
    ids,  # (rows, count) int64
    dz,  # (rows, cols), rows dz_stride apart
    count, cols, dz_stride,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_id = tl.load(ids + i_n * count + o_k, mask=o_k < count, other=-1)
    b_value = tl.load(values + i_n * count + o_k, mask=o_k < count, other=0.0)
    p_dz = dz + i_n * dz_stride + b_id
    tl.store(p_dz, b_value.to(dz.dtype.element_ty), mask=(b_id >= 0) & (b_id < cols))


def target_logits(head: Head, hidden: Tensor, ids: Tensor) -> Tensor:
    """(rows, K) fp32 logits z of hidden (rows, D) at the ids (rows, K); 0 outside the head."""
    hidden, weight = _row_major(hidden), _row_major(head.weight)
    z = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    (rows, count), (cols, depth) = ids.shape, weight.shape
    if rows:
        _products[rows, triton.cdiv(count, _TARGETS)](
            hidden, weight, ids.contiguous(), z, count, cols, depth, hidden.stride(0),
            weight.stride(0), BLOCK_K=_TARGETS, BLOCK_D=_DEPTH,
        )  # fmt: skip
    if head.bias is not None:
        z += torch.where((ids >= 0) & (ids < cols), head.bias[ids.clamp(0, cols - 1)], 0)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def add_target_sums(out: Tensor, factors: Tensor, weight: Tensor, ids: Tensor) -> None:
    """As `blocked_torch.add_target_sums`; `out` is contiguous."""
    weight = _row_major(weight)
    (rows, count), (cols, depth) = ids.shape, weight.shape
    if rows:
        _sums[rows, triton.cdiv(depth, _SUM_DEPTH)](
            factors.contiguous(), weight, ids.contiguous(), out, count, cols, depth,
            weight.stride(0), BLOCK_K=_SUM_TARGETS, BLOCK_D=_SUM_DEPTH,
        )  # fmt: skip


def store_entries(dz: Tensor, ids: Tensor, values: Tensor) -> None:
    """dz[row, ids[row, k]] = values[row, k] (rows, K), where dz (rows, cols) has the id."""
    rows, count = ids.shape
    if rows:
        _store[rows, triton.cdiv(count, _TARGETS)](
            values.contiguous(), ids.contiguous(), dz, count, dz.shape[1], dz.stride(0),
            BLOCK_K=_TARGETS, num_warps=1,
        )  # fmt: skip


def _row_major(x: Tensor) -> Tensor:
    """x (rows, columns) with adjacent columns."""
    return x if x.stride(1) == 1 else x.contiguous()
