"""One full-vocabulary OPSD micro-step in a process of its own, and how far memory grows in it.

    echo '{"config": {...}, "method": "plain", "tokens": 512}' | python -m benchmarks.study.one_step

`ours` is the trainer's method. `plain` keeps the logits of both models and leaves the divergence to
autograd, operation by operation as TRL's GKDTrainer and the authors' code (siyan-zhao/OPSD) do it.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks import resident
from opsd_kernels import reference
from opsd_kernels.integrations.heads import LmHead
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.distributed.context import DistributedContext, resolve_device
from opsd_train.methods.base import Method
from opsd_train.methods.opsd import Opsd
from opsd_train.model.policy import Policy, load_policy, load_tokenizer

StepMethod = Literal["ours", "plain"]
METHODS: tuple[StepMethod, ...] = ("ours", "plain")

_WARM_UP = 16  # tokens: libraries load, threads start


def make_sample(config: Config, tokenizer: Any, tokens: int) -> Sample:
    """The recipe's first problem, with a completion of `tokens` random tokens."""
    problem = load_problems(config.data)[0][0]
    builder = PromptBuilder(tokenizer, config.prompts)
    generator = torch.Generator().manual_seed(config.seed)
    completion = torch.randint(len(tokenizer), (tokens,), generator=generator).tolist()
    return Sample(problem, builder.student(problem), builder.teacher(problem), completion)


def our_loss(method: Method, sample: Sample) -> Tensor:
    """What Trainer.step does for a micro-batch, up to the backward pass."""
    method.policy.model.eval()
    (precomputed,) = method.precompute([[sample]])
    method.policy.model.train()  # only then are activations checkpointed
    return method.loss([sample], precomputed, len(sample.completion))[0]


def plain_loss(policy: Policy, sample: Sample, beta: float) -> Tensor:
    """The same loss from the (N, V) logits of both models, in the compute type, at completions."""
    assert sample.teacher_prompt is not None  # the recipe's method is opsd
    completions = [sample.completion]
    policy.model.eval()
    with torch.no_grad(), policy.without_adapters():
        teacher = policy.run([sample.teacher_prompt], completions, _logits)
    policy.model.train()
    student = policy.run([sample.student_prompt], completions, _logits)
    return generalized_jsd(student, teacher, beta)


def _logits(hidden: Tensor, head: LmHead, target: Tensor) -> Tensor:
    return reference.logits(
        hidden, head.weight, head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Mean over N of beta KL(t, m) + (1 - beta) KL(s, m), m = beta t + (1 - beta) s, in float32.

    `student`, `teacher`: (N, V) logits; 0 < beta < 1.
    """
    ls = F.log_softmax(student.float(), -1)
    lt = F.log_softmax(teacher.float(), -1)
    lm = torch.stack([ls + math.log1p(-beta), lt + math.log(beta)]).logsumexp(0)
    of_teacher = F.kl_div(lm, lt, reduction="none", log_target=True)
    of_student = F.kl_div(lm, ls, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum() / len(student)


@dataclass(frozen=True)
class Step:
    """A loaded model that takes the same step at any length."""

    config: Config
    tokenizer: Any
    policy: Policy
    method: Method

    def __call__(self, kind: StepMethod, tokens: int) -> float:
        """Forward, loss and backward; the loss."""
        sample = make_sample(self.config, self.tokenizer, tokens)
        self.policy.model.zero_grad()
        if kind == "ours":
            loss = our_loss(self.method, sample)
        else:
            loss = plain_loss(self.policy, sample, self.config.loss.beta)
        loss.backward()
        return loss.item()


def load_step(config: Config) -> Step:
    """The recipe's model and method on its device."""
    context = DistributedContext(resolve_device(config.model.device))
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config.model, config.lora, tokenizer, context, "none")
    return Step(config, tokenizer, policy, Opsd(config, policy))


def growth(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `work` holds at its fullest beyond what is there before it.

    On a GPU of the allocator, else of the resident set (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if reason := resident.why_not():
        raise UserError(f"measuring peak memory {reason}; use a GPU")
    resident.reset_peak()
    before = resident.resident()
    work()
    return resident.peak() - before


def main() -> int:
    asked = json.load(sys.stdin)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        step = load_step(config_from(asked["config"]))
        step(asked["method"], min(_WARM_UP, asked["tokens"]))
        step.policy.model.zero_grad()
        taken = growth(lambda: step(asked["method"], asked["tokens"]), step.policy.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"mib": taken / 2**20}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
