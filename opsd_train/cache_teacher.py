"""The command cache-teacher: write a teacher's most likely tokens of the reference solutions."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from opsd_train.config.errors import UserError
from opsd_train.config.method_schema import TeacherConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.fingerprint import Fingerprint, fingerprint
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import Measured, PromptBuilder
from opsd_train.data.teacher_cache import CacheKey, TeacherCache
from opsd_train.distributed.context import DistributedContext, init_distributed
from opsd_train.methods.distill import Distill
from opsd_train.methods.distributions import TopTokens
from opsd_train.methods.teachers import LocalTeacher, refuse_unknown_teachers
from opsd_train.model.policy import load_model_config, load_teacher, load_tokenizer
from opsd_train.model.weight_digest import weight_digest
from opsd_train.reporting.out_of_memory import explained
from opsd_train.rollout.context_checks import check_context
from opsd_train.rollout.trajectories import solution_sample

Top = tuple[np.ndarray, np.ndarray]
"""Ids and log-probabilities (T, k) at one completion."""


def cache_teacher(config: Config) -> None:
    """Write the caches of the recipe's teachers, or what is missing of them: all training problems.

    Every process of torchrun holds the whole teacher and writes parts of its own. Raises UserError
    for a recipe without a cache, and if a folder has one of something else.
    """
    if not any(teacher.cache for _, teacher in _teachers(config)):
        raise UserError("cache-teacher needs a recipe of method distill with distill.cache=FOLDER")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    context = init_distributed(config.model.device)
    smaller = f"lower micro_batch_tokens ({config.micro_batch_tokens}) or take a smaller teacher"
    with explained(lambda: smaller):
        write_caches(config, context)
    context.shutdown()


def write_caches(config: Config, context: DistributedContext) -> None:
    """This process's share of the caches; see `cache_teacher`."""
    train, heldout = load_problems(config.data)
    refuse_unknown_teachers(config, [*train, *heldout])
    prompts = PromptBuilder(load_tokenizer(config.model), config.prompts)
    lengths = prompts.measure(train, Distill.required_texts(config))
    data = fingerprint(train, heldout)
    for name, settings in _teachers(config):
        if settings.cache is not None:
            own = lengths.of_teacher(name)
            teacher = _load(config, name, settings, prompts.tokenizer, own, context)
            key = _key(config, settings, prompts.tokenizer, own, data, teacher)
            cache = TeacherCache(Path(settings.cache), own.problems)
            _begin(cache, key, context)
            _write_parts(cache, config, prompts, teacher, context)
            if context.is_main:
                count = len(own.problems)
                print(f"the teacher's top {key.top_k} of {count} problems: {cache.folder}")
            del teacher
            gc.collect()  # a policy's model refers to itself


def _teachers(config: Config) -> list[tuple[str | None, TeacherConfig]]:
    return list(config.distill.by_name().items()) if config.distill else []


def _load(
    config: Config,
    name: str | None,
    settings: TeacherConfig,
    tokenizer: Any,
    lengths: Measured,
    context: DistributedContext,
) -> LocalTeacher:
    """The whole teacher on this process's device, checked to read its problems."""
    policy = load_teacher(config, settings, tokenizer, context, "none")
    student = load_model_config(config.model)
    check_context(config, student, {name: policy.core.config}, lengths, Measured([], {}))
    return LocalTeacher(policy, settings.prompt, config.loss, student.get_text_config().vocab_size)


def _key(
    config: Config,
    settings: TeacherConfig,
    tokenizer: Any,
    lengths: Measured,
    data: Fingerprint,
    teacher: LocalTeacher,
) -> CacheKey:
    return CacheKey.of(
        config,
        settings,
        tokenizer,
        data,
        problems=len(lengths.problems),
        teacher_vocab=teacher.vocab_size,
        student_vocab=load_model_config(config.model).get_text_config().vocab_size,
        weights=weight_digest(settings.teacher),
    )


def _begin(cache: TeacherCache, key: CacheKey, context: DistributedContext) -> None:
    """Begin the cache, or see that what is there is the beginning of the same."""
    if cache.exists:
        cache.key.refuse(key, cache.folder)
    context.barrier()  # before rank 0 makes it exist
    if context.is_main and not cache.exists:
        cache.begin(key)
    context.barrier()


def _write_parts(
    cache: TeacherCache,
    config: Config,
    prompts: PromptBuilder,
    teacher: LocalTeacher,
    context: DistributedContext,
) -> None:
    """This process's share of the missing parts, a line for each."""
    parts = cache.parts()
    missing = context.broadcast(cache.missing())  # as it was before any rank began
    if context.is_main:
        print(f"{cache.folder}: {len(missing)} of {len(parts)} parts to write", flush=True)
    own, start, tokens = missing[context.rank :: context.size], time.perf_counter(), 0
    for done, number in enumerate(own, 1):
        samples = [
            solution_sample(prompts, problem, Distill.teacher_prompt(config))
            for problem in parts[number]
        ]
        cache.write(number, samples, _top(teacher, samples, config.micro_batch_tokens))
        tokens += sum(len(sample.completion) for sample in samples)
        seconds = time.perf_counter() - start
        left = seconds / done * (len(own) - done)
        print(
            f"part {number + 1} of {len(parts)}: {len(samples)} problems; "
            f"{tokens / seconds:,.0f} tokens/s, {left:,.0f} s left",
            flush=True,
        )
    context.barrier()


def _top(teacher: LocalTeacher, samples: Sequence[Sample], token_budget: int) -> list[Top]:
    """What the teacher predicts of each sample, in their order."""
    found: dict[str, Top] = {}
    for group in micro_batches(samples, token_budget, teacher.policy.layout):
        top = teacher.distribution(group)
        assert isinstance(top, TopTokens)  # a recipe with a cache has loss.objective=top_k
        lengths = [len(sample.completion) for sample in group]
        columns = (top.ids.int().split(lengths), top.logprob.float().split(lengths))
        for sample, ids, logprob in zip(group, *columns, strict=True):
            found[sample.problem.id] = (ids.cpu().numpy(), logprob.cpu().numpy())
    return [found[sample.problem.id] for sample in samples]
