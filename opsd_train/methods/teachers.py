"""Where a teacher's distributions come from: a model in memory, a cache on disk, or servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.errors import UserError, suggest
from opsd_train.config.loss_schema import LossConfig
from opsd_train.config.method_schema import TeacherConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.files import shorten
from opsd_train.data.fingerprint import Fingerprint
from opsd_train.data.problems import Problem
from opsd_train.data.teacher_cache import (
    SHARED_VOCAB,
    TEACHER_VOCAB,
    TOP_K,
    WEIGHTS,
    CacheKey,
    TeacherCache,
)
from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import fsdp_modules
from opsd_train.methods.distributions import Distribution, TopTokens, teacher_distribution
from opsd_train.methods.served_teacher import ServedTeacher
from opsd_train.model.policy import Policy, load_model_config, load_teacher, teacher_model
from opsd_train.model.weight_digest import weight_digest


class Teacher(Protocol):
    """A frozen model that is asked what it predicts."""

    vocab_size: int
    """Entries of its vocabulary, padding included."""
    sharded: bool
    """Whether every rank has to call `distribution` equally often."""

    def distribution(self, samples: Sequence[Sample]) -> Distribution:
        """Its predictions at the samples' completion tokens, without gradient."""


class LocalTeacher:
    """A model in memory; with several processes its layers may be sharded over them."""

    def __init__(
        self,
        policy: Policy,
        prompt: Literal["student", "teacher"],
        loss: LossConfig,
        student_vocab: int,
    ) -> None:
        self.policy, self._prompt, self._loss = policy, prompt, loss
        self._head = lm_head(policy.core)  # whole on every rank: only the layers are sharded
        self.vocab_size = self._head.weight.shape[0]
        self.sharded = bool(fsdp_modules(policy.core))
        self._shared = min(self.vocab_size, student_vocab)

    def distribution(self, samples: Sequence[Sample]) -> Distribution:
        """One forward pass over the samples."""
        return teacher_distribution(
            self.policy, samples, self._prompt, self._loss, head=self._head, vocab_size=self._shared
        )


class CachedTeacher:
    """The predictions that `cache-teacher` has written; no model is in memory."""

    sharded = False

    def __init__(self, cache: TeacherCache, top_k: int, device: torch.device) -> None:
        self._cache, self._top_k, self._device = cache, top_k, device
        self.vocab_size = cache.key.values[TEACHER_VOCAB]
        self._shared = cache.key.values[SHARED_VOCAB]

    def distribution(self, samples: Sequence[Sample]) -> TopTokens:
        """The first `top_k` of what is in the cache."""
        ids, logprobs = zip(*map(self._cache.read, samples), strict=True)

        def joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([part[:, : self._top_k] for part in parts]))

        return TopTokens(
            joined(ids).long().to(self._device), joined(logprobs).to(self._device), self._shared
        )


def make_teachers(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    problems: Sequence[Problem],
    data: Fingerprint,
    context: DistributedContext,
    shard_mode: str,
) -> dict[str | None, Teacher]:
    """The recipe's teachers by the name that a problem's `teacher` has.

    policy     the student
    tokenizer  the student's
    problems   those that are trained on
    data       the fingerprint of all problems

    Raises UserError if a teacher cannot be loaded, or if its cache is not of this recipe.
    """
    assert config.distill is not None  # Config requires it for method=distill
    rows = lm_head(policy.core).weight.shape[0]
    teachers: dict[str | None, Teacher] = {}
    for name, settings in config.distill.by_name().items():
        if settings.cache is not None:
            own = problems_of(name, problems)
            cache = open_cache(config, settings, tokenizer, own, data, rows)
            teachers[name] = CachedTeacher(cache, config.loss.top_k, policy.device)
        elif settings.servers:
            teachers[name] = _served(config, settings, tokenizer, rows, policy.device, context)
        else:
            teacher = load_teacher(config, settings, tokenizer, context, shard_mode)
            teachers[name] = LocalTeacher(teacher, settings.prompt, config.loss, rows)
    return teachers


def _served(
    config: Config,
    settings: TeacherConfig,
    tokenizer: Any,
    student_vocab: int,
    device: torch.device,
    context: DistributedContext,
) -> ServedTeacher:
    """The teacher of the recipe's servers, with the student's tokenizer."""
    its_config = teacher_model(config, settings, tokenizer, context)

    def say(line: str) -> None:
        if context.is_main:
            print(f"warning: {line}", flush=True)

    return ServedTeacher(
        settings,
        config.loss.top_k,
        vocab_size=load_model_config(its_config).get_text_config().vocab_size,
        student_vocab=student_vocab,
        device=device,
        say=say,
    )


def problems_of(name: str | None, problems: Sequence[Problem]) -> list[Problem]:
    """Those of the problems that the teacher of this name reads."""
    return [problem for problem in problems if problem.teacher == name]


def refuse_unknown_teachers(config: Config, problems: Sequence[Problem]) -> None:
    """Raise UserError if a problem names a teacher that the recipe does not have."""
    known = config.distill.by_name() if config.distill else {}
    for problem in problems if config.distill else ():
        if problem.teacher not in known:
            names = sorted(str(name) for name in known)
            raise UserError(
                f"problem {problem.id} names the teacher {shorten(problem.teacher)} in column "
                f"{shorten(config.data.columns.teacher)}; distill.teachers has "
                f"{', '.join(names)}{suggest(str(problem.teacher), names)}"
            )


def open_cache(
    config: Config,
    settings: TeacherConfig,
    tokenizer: Any,
    problems: Sequence[Problem],
    data: Fingerprint,
    student_vocab: int,
) -> TeacherCache:
    """The cache of `settings`. Raises UserError if it is not whole, or not of this recipe.

    problems  that this teacher reads
    The teacher's weights are compared with the cache's where their files are on this machine.
    """
    assert settings.cache is not None
    cache = TeacherCache(Path(settings.cache), problems)
    written = cache.key
    ours = CacheKey.of(
        config,
        settings,
        tokenizer,
        data,
        problems=len(problems),
        teacher_vocab=written.values[TEACHER_VOCAB],
        student_vocab=student_vocab,
        weights=weight_digest(settings.teacher),
    )
    free = [TOP_K] if ours.values[TOP_K] <= written.values[TOP_K] else []
    free += [WEIGHTS] if ours.values[WEIGHTS] is None else []
    written.refuse(ours, cache.folder, free)
    cache.check()
    return cache
