"""Registered operator of the largest log-probabilities: schema and fake kernel; no autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import checks
from opsd_kernels.ops.common import (
    HOST_READS,
    backend_of,
    backend_scope,
    by_name,
    plan_for,
    whole_vocabulary,
)
from opsd_kernels.problem import Execution, GradsNeeded, Head, TopkProblem, stat_dtype


def topk(p: TopkProblem) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k) int64, lse (N,))."""
    h, e = p.head, p.execution
    found: tuple[Tensor, Tensor, Tensor] = topk_tokens(
        h.hidden, h.weight, h.bias, p.labels, p.keep, h.softcap, h.temperature, p.k,
        p.ignore_index, e.schedule, e.workspace_bytes, e.group_name,
    )  # fmt: skip
    return found


def _problem(a: Mapping[str, Any]) -> TopkProblem:
    """The problem of an operator's arguments."""
    head = Head(*(a[name] for name in ("input", "weight", "bias", "softcap", "temperature")))
    run = Execution(a["schedule"], a["workspace_bytes"], a["group_name"])
    return TopkProblem(head, a["labels"], a["keep"], a["k"], a["ignore_index"], run)


@torch.library.custom_op("opsd_kernels::topk", mutates_args=(), tags=HOST_READS)
def topk_tokens(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    softcap: float | None,
    temperature: float,
    k: int,
    ignore_index: int,
    schedule: str,
    workspace_bytes: int | None,
    group_name: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k), lse (N,))."""
    p = _problem(locals())
    with backend_scope(p.head.hidden):
        checks.refuse_in_capture(p.head.hidden, shift_labels=labels, process_group=group_name)
        _, vocab_size, largest = whole_vocabulary(p.head, p.execution)
        if k > vocab_size:
            raise ValueError(
                f"k: expected an integer from 1 to {vocab_size}, the vocabulary's size, got {k}"
            )
        if labels is not None:
            p.keep = checks.labels_in_vocabulary("shift_labels", labels, keep, vocab_size)
        chosen = plan_for("topk", p.head, largest, p.execution, None, GradsNeeded(), k=k)
        found: tuple[Tensor, Tensor, Tensor] = backend_of(chosen.backend).topk(p, chosen)
        return found


@topk_tokens.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = by_name("topk", inputs)
    h, k = a["input"], a["k"]
    tokens, dtype = h.shape[0], stat_dtype(h.dtype)
    return (
        h.new_empty(tokens, k, dtype=dtype),
        h.new_empty(tokens, k, dtype=torch.int64),
        h.new_empty(tokens, dtype=dtype),
    )
