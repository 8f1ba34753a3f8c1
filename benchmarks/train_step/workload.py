"""The step of every contender: the same prompts, micro-batches and completion length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jinja2

from benchmarks.train_step.settings import Settings
from opsd_train.config.errors import UserError
from opsd_train.config.load import config_from, load_recipe
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.problems import Problem, load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.model.policy import load_tokenizer

_RECIPE = "demo/opsd"


@dataclass(frozen=True)
class Workload:
    """Samples in ascending length, `micro_batch` of them in each micro-batch."""

    config: Config
    tokenizer: Any
    samples: list[Sample]  # their completions are placeholders of the right length
    micro_batch: int

    def facts(self) -> dict[str, int]:
        """Samples per micro-batch, and the longest sequence in tokens."""
        return {"micro_batch": self.micro_batch, "longest_sequence": self.samples[-1].longest}

    def messages(self) -> list[tuple[str, str]]:
        """(student's message, what the teacher's message adds to it) of each sample, for TRL."""
        prompts = self.config.prompts
        return [_split(prompts.student, prompts.teacher, s.problem) for s in self.samples]


def build(settings: Settings, scratch: str) -> Workload:
    """The demo's recipe with JSD at beta 0.5, no evaluation, and equal micro-batches.

    `scratch` is the output folder. Raises UserError if the samples do not make equal micro-batches.
    """
    changes = [
        f"output_dir={json.dumps(scratch)}",
        f"model.name_or_path={json.dumps(settings.model)}",
        f"problems_per_step={settings.prompts}",
        f"steps={settings.steps + 1}",
        f"data.train_size={settings.prompts}",
        "data.heldout_size=0",
        "evaluation.problems=0",
        f"rollout.max_new_tokens={settings.tokens}",
        f"model.gradient_checkpointing={json.dumps(settings.gradient_checkpointing)}",
        "loss.beta=0.5",
        "optim.warmup_steps=0",
    ]
    recipe = load_recipe(_RECIPE)
    config = config_from(recipe, changes)
    tokenizer = load_tokenizer(config.model)
    samples = _samples(config, tokenizer)
    micro_batch = _even_cut(samples, config.micro_batch_tokens)
    budget = micro_batch * samples[-1].longest
    whole = len(samples) * samples[-1].longest  # all samples in one rollout batch
    changes += [f"micro_batch_tokens={budget}", f"rollout.batch_tokens={whole}"]
    config = config_from(recipe, changes)
    if any(len(group) != micro_batch for group in micro_batches(samples, budget)):
        raise UserError(
            f"--prompts {settings.prompts}: the samples do not fall into equal micro-batches of "
            f"{micro_batch}, which TRL needs, so unlike are their lengths; take another number"
        )
    return Workload(config, tokenizer, samples, micro_batch)


def _samples(config: Config, tokenizer: Any) -> list[Sample]:
    problems, _ = load_problems(config.data)
    builder = PromptBuilder(tokenizer, config.prompts)
    filler = [tokenizer.pad_token_id] * config.rollout.max_new_tokens
    made = [Sample(p, builder.student(p), builder.teacher(p), filler) for p in problems]
    return sorted(made, key=lambda sample: sample.longest)


def _even_cut(samples: list[Sample], budget: int) -> int:
    """The largest micro-batch that divides the samples evenly and fits into the token budget."""
    count, longest = len(samples), samples[-1].longest
    fitting = (m for m in range(count, 0, -1) if count % m == 0 and m * longest <= budget)
    return next(fitting, 1)


def _split(student: str, teacher: str, problem: Problem) -> tuple[str, str]:
    """Both TRL and the demo's recipe join the two by an empty line."""
    asked, shown = (_render(template, problem) for template in (student, teacher))
    return asked, shown.removeprefix(f"{asked}\n\n")


def _render(template: str, problem: Problem) -> str:
    return jinja2.Template(template, undefined=jinja2.StrictUndefined).render(problem=problem)
