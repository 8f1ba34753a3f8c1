"""Check every loss and schedule at a real model's head, with few tokens, against float64."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_report.job import SMALL, SMALL_TOKENS, GpuJob, deal
from benchmarks.gpu_report.work import one_by_one
from benchmarks.losses.cases import DIFFERENTIATED, ONE_HEAD, Case, Shape
from benchmarks.losses.check import rms
from benchmarks.losses.contenders import our_call, ways
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import Truth, truth

# Two blocks of rows, the second partial, with the larger vocabulary; the smaller one is odd.
_TOKENS, _HIDDEN, _VOCABS = 640, 4096, (151936, 50257)
_DTYPES = ("bfloat16", "float32")
_SMALL_DTYPES = ("float32",)  # Triton's interpreter computes bf16 wrongly
# Limits on the relative error of the loss and the relative RMS error of the gradient.
LIMITS = {"bfloat16": (2e-3, 1e-2), "float32": (1e-4, 1e-3)}


def shards(job: GpuJob) -> list[list[str]]:
    """Each dtype and vocabulary has its own processes, so that few hold the largest head.

    A loss is not split between processes: its truth is computed once.
    """
    sizes = list(product(_SMALL_DTYPES, (SMALL.vocab,)) if job.small else product(_DTYPES, _VOCABS))
    workers = max(1, job.workers // len(sizes))
    hands = [(size, hand) for size in sizes for hand in deal(DIFFERENTIATED, workers)]
    return [_ids(hand, *size, job) for size, hand in hands]


def _ids(operations: list[str], dtype: str, vocab: int, job: GpuJob) -> list[str]:
    return [
        f"{operation} {schedule} {precision} {head} {dtype} {vocab}"
        for operation in operations
        for schedule, precision in ways(_case(operation, dtype, vocab, job), job.device)
        for head in (("one",) if operation in ONE_HEAD else ("shared", "distinct"))
    ]


def run(identifier: str, job: GpuJob) -> dict[str, Any]:
    """Relative errors of loss and gradient. Raises AssertionError if one exceeds LIMITS."""
    operation, schedule, precision, head, dtype, vocab = identifier.split()
    torch.backends.cuda.matmul.allow_tf32 = False
    case = _case(operation, dtype, int(vocab), job)
    x, true = _inputs(case.shape, dtype, job.device), _truth(case, job.device)
    x.case = case
    x.clear()
    loss = our_call(x, schedule, precision, shared=head == "shared")
    loss.backward()
    found = {
        "loss": loss.item() / true.loss - 1,
        "grad_hidden": rms(x.student.grad, true.grad_hidden),
    }
    for error, limit, name in zip(found.values(), LIMITS[dtype], found, strict=True):
        if not abs(error) <= limit:
            raise AssertionError(f"{name} is off by {error:.3g}, allowed {limit:.3g}")
    return found


@functools.cache
def _inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    """The inputs, made once for all losses: several processes share the device's memory."""
    tokens = SMALL_TOKENS if shape.hidden == SMALL.hidden else _TOKENS
    return Inputs(Case("jsd", "frozen", dtype, shape, tokens), device)


@functools.cache
def _truth(case: Case, device: torch.device) -> Truth:
    x = _inputs(case.shape, case.dtype, device)
    x.case = case
    return truth(x)


def _case(operation: str, dtype: str, vocab: int, job: GpuJob) -> Case:
    tokens, hidden = (SMALL_TOKENS, SMALL.hidden) if job.small else (_TOKENS, _HIDDEN)
    return Case(operation, "frozen", dtype, Shape(f"smoke{vocab}", hidden, vocab), tokens)


work = one_by_one(run)
