"""Greedy accuracy and divergence on held-out problems, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample, balanced_micro_batches
from opsd_train.data.problems import Problem
from opsd_train.data.prompts import PromptBuilder
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.accuracy import Evaluation
from opsd_train.evaluation.rewards import Rewards
from opsd_train.methods.base import Method
from opsd_train.reporting.step_stats import StepStats
from opsd_train.rollout.trajectories import Trajectories


class HeldOut:
    """The held-out problems of a run. Each rank answers its share and gets all ranks' answers.

    Every rank makes every call.
    """

    def __init__(
        self,
        config: Config,
        problems: Sequence[Problem],
        prompts: PromptBuilder,
        trajectories: Trajectories,
        method: Method,
        rewards: Rewards,
        context: DistributedContext,
    ) -> None:
        self._config, self.problems, self._prompts = config, list(problems), prompts
        self._trajectories, self._method = trajectories, method
        self._rewards, self._context = rewards, context

    def evaluate(self, side: str) -> Evaluation:
        """Solve each problem once, greedily, under the prompt of `side`: "student" or "teacher"."""
        mine = self.problems[self._context.rank :: self._context.size]
        prompts = [getattr(self._prompts, side)(problem) for problem in mine]
        made = self._trajectories.greedy(prompts, self._config.evaluation.max_new_tokens)
        tokens = [completion.tokens for completion in made]
        grades = self._rewards.collect(self._rewards.submit(mine, tokens))
        parts = self._context.all_gather(tokens)
        completions: list[list[int]] = [[] for _ in self.problems]
        for rank, part in enumerate(parts):
            completions[rank :: self._context.size] = part
        reasons = [grade.reason for grade in grades]
        return Evaluation(completions, [grade.correct for grade in grades], reasons)

    @torch.no_grad()
    def divergence(self, evaluation: Evaluation) -> float:
        """Divergence from the teacher in nats, over those tokens of the completions that count."""
        everything = [
            Sample(problem, self._prompts.student(problem), self._teacher(problem), completion)
            for problem, completion in zip(self.problems, evaluation.completions, strict=True)
        ]
        samples = everything[self._context.rank :: self._context.size]  # none on some, if few
        policy, budget = self._method.policy, self._config.micro_batch_tokens
        policy.model.eval()
        groups = balanced_micro_batches(everything, samples, budget, self._context, policy.layout)
        stats = StepStats()
        for group, precomputed in zip(groups, self._method.precompute(groups), strict=True):
            loss, columns = self._method.loss(group, precomputed, 1)
            if group[0].weight > 0:
                stats.add(group, loss, columns)
        known = stats.known("divergence")
        total = (stats.mean("divergence") or 0.0) * known
        return self._context.sum(total) / max(self._context.sum(known), 1)

    def _teacher(self, problem: Problem) -> list[int] | None:
        needed = self._method.teacher_prompt(self._config)
        return self._prompts.teacher(problem) if needed else None
