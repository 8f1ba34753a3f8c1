"""The largest step that a recipe's data can make: the samples of every rank, cut as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_train.config.schema import Config
from opsd_train.data.batches import (
    Sample,
    deal_to_all,
    micro_batches,
    refuse_more_ranks_than_samples,
    token_batches,
)
from opsd_train.data.fingerprint import Fingerprint, fingerprint
from opsd_train.data.layout import PADDED, Layout
from opsd_train.data.problems import Problem, load_problems
from opsd_train.data.prompts import Measured, PromptBuilder
from opsd_train.data.teacher_cache import TeacherCache
from opsd_train.dry_run.memory import GenerationBatch, LargestStep
from opsd_train.dry_run.setup import core_of, teacher_model, teachers_of
from opsd_train.methods import METHODS
from opsd_train.methods.teachers import open_cache, problems_of, refuse_unknown_teachers
from opsd_train.model.families import shared_layout
from opsd_train.model.policy import load_model_config, load_tokenizer
from opsd_train.rollout.context_checks import check_batch_tokens, check_context, heldout_texts


@dataclass(frozen=True)
class Rows:
    """A micro-batch under one of its prompts: rows of `width` tokens, padding included."""

    count: int
    width: int
    masked: bool  # rows hold several completions, kept apart by a mask

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.count * self.width


@dataclass(frozen=True)
class MicroBatch:
    """What the passes of a micro-batch read."""

    student: Rows
    teacher: Rows
    loss_tokens: int


@dataclass(frozen=True)
class PlannedStep:
    """The largest step: each rank's share, and what they all do together.

    Ranks that share weights wait for each other in every layer, so micro-batch i takes as long as
    the largest of the ranks' i-th ones: those are `micro_batches`.
    """

    ranks: tuple[LargestStep, ...]
    micro_batches: tuple[MicroBatch, ...]
    generations: tuple[GenerationBatch, ...]  # of the rank with most, by the transformers engine
    loss_tokens: int  # of all ranks
    problems: int  # in the data
    longest_prompt: int

    @property
    def largest(self) -> LargestStep:
        """The share with the largest micro-batch."""
        return max(self.ranks, key=lambda rank: max(rank.tokens, rank.teacher_tokens))


def plan_step(config: Config, ranks: int) -> PlannedStep:
    """The longest problems of the data, with completions of the largest length, on `ranks` ranks.

    Raises UserError for data or limits that the recipe cannot be trained with.
    """
    method, (train, heldout) = METHODS[config.method], load_problems(config.data)
    refuse_unknown_teachers(config, [*train, *heldout])
    builder = PromptBuilder(load_tokenizer(config.model), config.prompts)
    lengths = builder.measure(train, method.required_texts(config))
    _check_caches(config, builder.tokenizer, lengths.problems, fingerprint(train, heldout))
    heldout = heldout[: config.evaluation.problems]
    heldout_lengths = builder.measure(heldout, heldout_texts(config))
    model_config = load_model_config(config.model)
    check_context(config, model_config, _teacher_configs(config), lengths, heldout_lengths)

    on_solutions = method.source(config) == "solution"
    count = 1 if on_solutions else config.rollout.samples_per_prompt
    refuse_more_ranks_than_samples(config.problems_per_step, count, ranks)
    problems = _longest(lengths, config.problems_per_step)
    samples = [s for p in problems for s in [_sample(builder, p, config)] * count]
    layout = shared_layout(core_of(config.model)) or PADDED
    shares = [
        list(micro_batches(own, config.micro_batch_tokens, layout))
        for own in deal_to_all(samples, layout, ranks)
    ]
    cut = [[_micro_batch(group, layout, config) for group in groups] for groups in shares]
    generations = () if on_solutions else _generations(config, samples, ranks)
    evaluation = _evaluation(config, heldout_lengths, ranks)
    prompts = [tokens for side, tokens in lengths.tokens.items() if side != "solution"]
    return PlannedStep(
        ranks=tuple(_share(own, _largest_batch(generations), evaluation) for own in cut),
        micro_batches=_slowest(cut),
        generations=generations,
        loss_tokens=sum(len(sample.completion) for sample in samples),
        problems=len(lengths.problems),
        longest_prompt=max(map(max, prompts)),
    )


def cache_is_there(cache: str | None) -> bool:
    """Whether this folder has a teacher's cache, or the beginning of one."""
    return cache is not None and TeacherCache(Path(cache), ()).exists


def _share(
    own: list[MicroBatch], rollout: GenerationBatch | None, evaluation: GenerationBatch | None
) -> LargestStep:
    return LargestStep(
        tokens=max(batch.student.tokens for batch in own),
        teacher_tokens=max(batch.teacher.tokens for batch in own),
        longest=max(max(batch.student.width, batch.teacher.width) for batch in own),
        loss_tokens=max(batch.loss_tokens for batch in own),
        all_loss_tokens=sum(batch.loss_tokens for batch in own),
        rollout=rollout,
        evaluation=evaluation,
    )


def _slowest(shares: list[list[MicroBatch]]) -> tuple[MicroBatch, ...]:
    """The largest i-th micro-batch of all ranks, for every i; ranks with fewer wait."""
    count = max(map(len, shares))
    ith = ([own[i] for own in shares if len(own) > i] for i in range(count))
    return tuple(max(each, key=lambda b: b.student.tokens + b.teacher.tokens) for each in ith)


def _micro_batch(group: Sequence[Sample], layout: Layout, config: Config) -> MicroBatch:
    completions = [sample.completion for sample in group]
    student = [sample.student_prompt for sample in group]
    teacher = [sample.teacher_prompt or sample.student_prompt for sample in group]
    return MicroBatch(
        _rows(student, completions, layout),
        _rows(teacher, completions, layout),
        sum(map(len, completions)),
    )


def _rows(prompts: list[list[int]], completions: list[list[int]], layout: Layout) -> Rows:
    lengths = layout.lengths(prompts, completions)
    if layout.kind == "packed":
        return Rows(1, sum(lengths), False)
    return Rows(len(lengths), max(lengths), len(lengths) < len(prompts))


def _generations(
    config: Config, samples: Sequence[Sample], ranks: int
) -> tuple[GenerationBatch, ...]:
    """The batches of the rank with the most samples, whose prompts are the longest."""
    if config.rollout.engine != "transformers":  # vLLM has memory of its own
        return ()
    sides = [f"{METHODS[config.method].source(config)}_prompt"]
    if config.distill and config.distill.sampler_share:
        sides.append("teacher_prompt")  # the teacher's sequences grow beside the student's
    prompts = sorted(max(len(getattr(s, side) or ()) for side in sides) for s in samples)
    share = -(-len(samples) // ranks)
    return _batches(prompts[-share:], config.rollout.max_new_tokens, config)


def _evaluation(config: Config, heldout: Measured, ranks: int) -> GenerationBatch | None:
    if not heldout.problems or config.rollout.engine != "transformers":
        return None
    side = "teacher" if config.evaluation.teacher else "student"
    share = -(-len(heldout.problems) // ranks)
    prompts = sorted(heldout.tokens[side])[-share:]
    return _largest_batch(_batches(prompts, config.evaluation.max_new_tokens, config))


def _batches(prompts: list[int], new: int, config: Config) -> tuple[GenerationBatch, ...]:
    """The batches in which prompts of these lengths, in rising order, are generated from."""
    budget = config.rollout.batch_tokens
    check_batch_tokens("rollout.batch_tokens", budget, prompts[-1], new)
    cut = token_batches(((length, length + new) for length in prompts), budget)
    return tuple(GenerationBatch(len(batch), batch[-1], new) for batch in cut)


def _largest_batch(batches: Sequence[GenerationBatch]) -> GenerationBatch | None:
    return max(batches, key=lambda b: b.rows * (b.prompt + b.new), default=None)


def _longest(train: Measured, count: int) -> list[Problem]:
    """The `count` problems with the longest sequences, in rising order; again if there are less."""
    prompts = [tokens for side, tokens in train.tokens.items() if side != "solution"]
    longest = list(map(max, zip(*prompts, prompts[0], strict=True)))
    if "solution" in train.tokens:
        longest = list(map(sum, zip(longest, train.tokens["solution"], strict=True)))
    again = -(-count // len(longest))
    order = sorted([*range(len(longest))] * again, key=longest.__getitem__)
    return [train.problems[index] for index in order[-count:]]


def _sample(builder: PromptBuilder, problem: Problem, config: Config) -> Sample:
    """A sample of this problem with the longest completion possible."""
    method = METHODS[config.method]
    teacher = None
    if method.teacher_prompt(config):
        after = [0] * config.prompts.max_prompt_tokens  # made after a rollout, up to this length
        teacher = after if config.prompts.teacher_context else builder.teacher(problem)
    sources, completions = method.sources(config), []
    if "solution" in sources:
        completions.append(builder.solution(problem))
    if sources != ("solution",):
        completions.append([0] * config.rollout.max_new_tokens)
    return Sample(problem, builder.student(problem), teacher, max(completions, key=len))


def _check_caches(
    config: Config, tokenizer: Any, problems: Sequence[Problem], data: Fingerprint
) -> None:
    """Raises UserError if a teacher's cache is there, but not whole or not of this recipe."""
    rows = load_model_config(config.model).get_text_config().vocab_size
    for name, teacher in teachers_of(config).items():
        if cache_is_there(teacher.cache):
            open_cache(config, teacher, tokenizer, problems_of(name, problems), data, rows)


def _teacher_configs(config: Config) -> dict[str | None, Any]:
    """The transformers configurations of other models in memory, by the teacher's name."""
    return {
        name: load_model_config(teacher_model(config, teacher))
        for name, teacher in teachers_of(config).items()
        if teacher.in_memory
    }
