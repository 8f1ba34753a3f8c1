"""The command cache-teacher: write a teacher's most likely tokens of the reference solutions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers.utils import logging as transformers_logging

from opsd_train.config.errors import UserError
from opsd_train.config.method_schema import DistillConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.fingerprint import fingerprint
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import Measured, PromptBuilder
from opsd_train.data.teacher_cache import CacheKey, TeacherCache
from opsd_train.distributed.context import DistributedContext, init_distributed
from opsd_train.methods.distill import Distill
from opsd_train.methods.distillation import TopTokens
from opsd_train.methods.teachers import LocalTeacher
from opsd_train.model.policy import load_model_config, load_teacher, load_tokenizer
from opsd_train.model.weight_digest import weight_digest
from opsd_train.rollout.context_checks import check_context
from opsd_train.rollout.trajectories import solution_sample

Top = tuple[np.ndarray, np.ndarray]
"""Ids and log-probabilities (T, k) at one completion."""


def cache_teacher(config: Config) -> None:
    """Write `distill.cache`, or what is missing of it: all training problems of the recipe.

    Every process of torchrun holds the whole teacher and writes parts of its own. Raises UserError
    for a recipe without a cache, and if the folder has one of something else.
    """
    if config.distill is None or config.distill.cache is None:
        raise UserError("cache-teacher needs a recipe of method distill with distill.cache=FOLDER")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    context = init_distributed(config.model.device)
    write_cache(config, config.distill, context)
    context.shutdown()


def write_cache(config: Config, settings: DistillConfig, context: DistributedContext) -> None:
    """This process's share of the cache of `settings`, which is the recipe's `distill`."""
    assert settings.cache is not None
    train, heldout = load_problems(config.data)
    tokenizer = load_tokenizer(config.model)
    prompts = PromptBuilder(tokenizer, config.prompts)
    lengths = prompts.measure(train, Distill.required_texts(config))
    policy = load_teacher(config, tokenizer, context, "none")
    check_context(config, {"teacher": policy.core.config}, lengths, Measured([], {}))
    student_vocab = load_model_config(config.model).get_text_config().vocab_size
    teacher = LocalTeacher(policy, settings.prompt, config.loss, student_vocab)
    key = CacheKey.of(
        config,
        settings,
        tokenizer,
        fingerprint(train, heldout),
        problems=len(lengths.problems),
        teacher_vocab=teacher.vocab_size,
        student_vocab=student_vocab,
        weights=weight_digest(settings.teacher),
    )
    cache = TeacherCache(Path(settings.cache), lengths.problems)
    if cache.exists:
        cache.key.refuse(key, cache.folder)
    context.barrier()  # before rank 0 makes it exist
    if context.is_main and not cache.exists:
        cache.begin(key)
    context.barrier()
    missing, parts = cache.missing(), cache.parts()
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
    if context.is_main:
        print(f"the teacher's top {key.top_k} of {len(lengths.problems)} problems: {cache.folder}")


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
