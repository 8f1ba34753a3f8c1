"""Observations of a sharded model; each function runs on both ranks by `Pair.run`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opsd_kernels import fused_linear_cross_entropy
from opsd_kernels.integrations.heads import LmHead, lm_head
from opsd_train.cache_teacher import write_caches
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data import teacher_cache
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.grading import Answer
from opsd_train.reporting.step_stats import StepStats
from opsd_train.rollout import Completion, Request, Sampling
from opsd_train.trainer import Trainer
from tests.helpers.steps import Course, make_trainer

PROMPT = [5, 17, 40, 9]
LONG = Sampling(60)
OVERRIDES = ("rollout.batch_tokens=100",)  # one sequence of LONG at a time


def heads(context: DistributedContext, course: Course) -> dict[str, Any]:
    """The head as a loss gets it, and as it is outside of the model's forward."""
    policy = make_trainer(context, course).policy

    def describe(hidden: Tensor, head: LmHead, target: Tensor) -> dict[str, Any]:
        weight = head.weight
        return {
            "plain": type(weight.data) is Tensor and not isinstance(weight, DTensor),
            "value": weight.detach().float().clone(),
            "types": {weight.dtype, hidden.dtype},
            "trained": weight.requires_grad,
        }

    inside = policy.run([PROMPT], [[3, 4]], describe)
    if context.size == 1:
        return inside
    policy.core.reshard()  # as after every backward pass
    outside = lm_head(policy.core).weight
    hidden, target = torch.zeros(2, 32), torch.tensor([3, 4])
    try:
        fused_linear_cross_entropy(hidden, outside, target)
        refused = False
    except Exception:
        refused = True
    return inside | {"outside": type(outside).__name__, "refused": refused}


def structure(context: DistributedContext, course: Course) -> dict[str, Any]:
    """Which modules are FSDP modules, and the kinds of parameters."""
    policy = make_trainer(context, course).policy
    core, named = policy.core, dict(policy.model.named_parameters())
    units = {name: m for name, m in core.named_modules() if isinstance(m, FSDPModule)}
    return {
        "units": sorted(units),
        "peft": isinstance(policy.model, PeftModel),
        "peft_sharded": isinstance(policy.model, FSDPModule) and policy.model is not core,
        "plain": [name for name, p in named.items() if not isinstance(p, DTensor)],
        "trained_types": {p.dtype for p in policy.parameters},
        "frozen_types": {p.dtype for p in named.values() if not p.requires_grad},
        "adapters": [name for name in named if "lora_" in name],
        "tied": core.get_output_embeddings().weight is core.get_input_embeddings().weight,
    }


def evaluated(context: DistributedContext, course: Course) -> dict[str, Any]:
    """Greedy answers and the divergence on held-out problems, after two steps."""
    trainer = make_trainer(context, course)
    for step in (1, 2):
        trainer.step(step)
    # Any answer counts whose last token is even, so that not all are wrong.
    trainer.grader.right = _even
    student, teacher = (trainer.heldout.evaluate(side) for side in ("student", "teacher"))
    return {
        "student": student.completions,
        "teacher": teacher.completions,
        "correct": student.correct,
        "divergence": trainer.heldout.divergence(student),
    }


def generated_by_one_rank(context: DistributedContext, course: Course) -> list[Completion]:
    """Rank 0 generates nothing while the last rank does; then all go on together."""
    trainer = make_trainer(context, course)
    made: list[Completion] = []
    with trainer.policy.generating():
        if context.rank == context.size - 1:
            made = _generate(trainer)
    assert trainer.step(1) is not None
    return made


def generated_at_different_lengths(context: DistributedContext, course: Course) -> list[Completion]:
    """Rank 0 generates one token; the last rank many, over several batches."""
    trainer = make_trainer(context, course)
    last = context.rank == context.size - 1
    with trainer.policy.generating():
        made = _generate(trainer, LONG if last else Sampling(1))
    assert trainer.step(1) is not None
    return made


def failing_generation(context: DistributedContext, course: Course) -> dict[str, Any]:
    """A step after a generation that failed, and one after none."""
    trainer = make_trainer(context, course)
    kept = [parameter.detach().clone() for parameter in trainer.policy.parameters]
    outer = trainer.policy.generating()
    with outer:
        try:
            with trainer.policy.generating():  # not needed, but not harmful either
                inside = _types(trainer.policy.core)
                _generate(trainer, Sampling(1000))  # more than a batch holds
        except UserError:
            failed = True
        still = _types(trainer.policy.core)
    after = [parameter.detach() for parameter in trainer.policy.parameters]
    return {
        "failed": failed,
        "inside": inside,
        "still": still,
        "same": all(map(_equal, kept, after)),
        "loss": trainer.step(1)[0].get("loss"),
    }


def reductions(context: DistributedContext, course: Course) -> tuple[int, int]:
    """The number of all-reduces in a step, and of its micro-batches."""
    trainer, calls, groups = make_trainer(context, course), [], []
    accumulate, all_reduce = trainer._accumulate, distributed.all_reduce

    def counting(made: list, *rest: Any) -> StepStats:
        groups.extend(made)
        with mock.patch("torch.distributed.all_reduce", noting):
            return accumulate(made, *rest)

    def noting(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return all_reduce(*args, **options)

    trainer._accumulate = counting
    trainer.step(1)
    return len(calls), len(groups)


def write_small_parts(context: DistributedContext, config: Config) -> None:
    """A teacher's cache in parts of 3 problems, of which each rank writes some."""
    with mock.patch.object(teacher_cache, "PART_PROBLEMS", 3):
        write_caches(config, context)


def refusal(context: DistributedContext, course: Course) -> str:
    """The error message of a recipe that cannot be run."""
    try:
        make_trainer(context, course)
    except UserError as error:
        return str(error)
    return ""


def _generate(trainer: Trainer, sampling: Sampling = LONG) -> list[Completion]:
    requests = [Request([*PROMPT, extra], seed=extra) for extra in range(3)]
    return trainer.trajectories.engine.generate(requests, sampling)


def _types(core: nn.Module) -> set[tuple[str, torch.dtype]]:
    return {("shard" if isinstance(p, DTensor) else "whole", p.dtype) for p in core.parameters()}


def _equal(one: Tensor, two: Tensor) -> bool:
    one, two = (t.to_local() if isinstance(t, DTensor) else t for t in (one, two))
    return torch.equal(one, two)


def _even(answer: Answer) -> bool:
    return sum(answer.text.encode()) % 2 == 0
