"""Makes a step's samples from its problems: rollouts of an engine, or the reference solutions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from opsd_train.data.seeds import stable_seed
from opsd_train.methods.base import Method
from opsd_train.rollout import Completion, Engine, Request, Sampling
from opsd_train.rollout.agreement import check_agreement


@dataclass(frozen=True)
class RolloutRequest:
    """One sample that a step needs."""

    problem: Problem
    position: int  # of the problem in the step
    number: int  # which of the problem's samples


class Trajectories:
    """Makes the samples that a method trains on, and the greedy completions of an evaluation."""

    def __init__(
        self,
        config: Config,
        method: Method,
        prompts: PromptBuilder,
        engine: Engine,
        tokenizer: Any,
    ) -> None:
        self._config, self._method, self._prompts = config, method, prompts
        self._source = method.source(config)
        # With GKD's mix some steps train on the reference solutions instead.
        self._share = float(config.distill.on_policy) if config.distill else 1.0
        self._mixed = config.distill is not None and config.distill.sampler_share > 0
        self.engine, self._tokenizer = engine, tokenizer
        # With a context of the rollout the teacher's prompt is made later: see data/contexts.py.
        self._teacher_prompt = method.teacher_prompt(config) and not config.prompts.teacher_context
        self._agrees = False  # sampler and trainer; checked on the first rollout
        rollout = config.rollout
        # The sampler's log-probabilities are the policy's only where both have one distribution.
        self._comparable = (
            self._source == "student"
            and rollout.temperature == method.temperature
            and rollout.top_p == 1
            and rollout.top_k == 0
        )
        self.sampling = Sampling.of(rollout)

    def on_solutions(self, step: int) -> bool:
        """Whether a step trains on reference solutions: the same answer on every rank.

        A share of steps on samples, and each step whole, as in GKD's Algorithm 1 (arXiv
        2306.13649).
        """
        if self._source == "solution":
            return True
        return random.Random(stable_seed(self._config.seed, "source", step)).random() >= self._share

    def requests(self, problems: Sequence[Problem], step: int) -> list[RolloutRequest]:
        """The samples that a step needs, those of a problem side by side."""
        on_solutions = self.on_solutions(step)
        count = 1 if on_solutions else self._config.rollout.samples_per_prompt
        return [
            RolloutRequest(problem, position, number)
            for position, problem in enumerate(problems)
            for number in range(count)
        ]

    def make(self, step: int, wanted: Sequence[RolloutRequest]) -> list[Sample]:
        """A sample for each request, its answer not checked yet."""
        if self.on_solutions(step):
            return [
                solution_sample(self._prompts, request.problem, self._teacher_prompt)
                for request in wanted
            ]
        requests = self.prompted(step, wanted)
        with self._method.sampling():
            self.engine.sync()
            completions = self.engine.generate(requests, self.sampling)
            if not self._agrees and not self._mixed:  # the trainer has no mixture to compare with
                engine = self._config.rollout.engine
                check_agreement(self._method.policy, requests, completions, self.sampling, engine)
                self._agrees = True
        return self.samples(wanted, completions)

    def sync(self) -> None:
        """Have the engine sample as `make` does from now on."""
        with self._method.sampling():
            self.engine.sync()

    def prompted(self, step: int, wanted: Sequence[RolloutRequest]) -> list[Request]:
        """What the engine is asked for; each completion has a seed of its own."""
        prompt = getattr(self._prompts, self._source)
        own = self._mixed and self._teacher_prompt  # the teacher of a mixture reads its own prompt
        return [
            Request(
                prompt(request.problem),
                stable_seed(self._config.seed, step, request.position, request.number),
                self._prompts.teacher(request.problem) if own else None,
            )
            for request in wanted
        ]

    def samples(
        self, wanted: Sequence[RolloutRequest], completions: Sequence[Completion]
    ) -> list[Sample]:
        """The samples of these completions, one for each request."""
        samples = [
            self._sample(request.problem, completion)
            for request, completion in zip(wanted, completions, strict=True)
        ]
        return [self._as_target(sample) for sample in samples] if self._method.imitates else samples

    def greedy(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Completion]:
        """Greedy completions for evaluation."""
        self.engine.sync()
        requests = [Request(prompt, seed=0) for prompt in prompts]
        return self.engine.generate(requests, Sampling(max_new_tokens))

    def _sample(self, problem: Problem, completion: Completion) -> Sample:
        return Sample(
            problem,
            *_both_prompts(self._prompts, problem, self._teacher_prompt),
            completion.tokens,
            logprobs=completion.logprobs if self._comparable else None,
            finished=completion.finished,
        )

    def _as_target(self, sample: Sample) -> Sample:
        """Ended as a turn of the chat ends, where another special token ended it."""
        last, end = sample.completion[-1], self._prompts.end
        if not sample.finished or last == end[-1] or last not in self._tokenizer.all_special_ids:
            return sample
        # The sampler drew another token, so its log-probabilities are not these tokens'.
        return replace(sample, completion=[*sample.completion[:-1], *end], logprobs=None)


def solution_sample(prompts: PromptBuilder, problem: Problem, teacher_prompt: bool) -> Sample:
    """The reference solution as a sample. `teacher_prompt`: it needs the teacher's prompt too."""
    return Sample(
        problem, *_both_prompts(prompts, problem, teacher_prompt), prompts.solution(problem)
    )


def _both_prompts(
    prompts: PromptBuilder, problem: Problem, teacher_prompt: bool
) -> tuple[list[int], list[int] | None]:
    return prompts.student(problem), prompts.teacher(problem) if teacher_prompt else None
