"""The training loop and its step.

One step: draw problems -> build prompts -> generate completions -> weight the samples -> cut them
into micro-batches by a token budget -> run the method's passes without gradient -> loss over the
hidden states at the completion tokens -> backward -> clip, AdamW, schedule -> metrics. The loss is
a mean over all loss tokens of the step, however many micro-batches and processes share them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import (
    Sample,
    balanced_micro_batches,
    deal,
    refuse_more_ranks_than_samples,
)
from opsd_train.data.contexts import TeacherContexts
from opsd_train.data.fingerprint import fingerprint
from opsd_train.data.order import make_order
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.data.seeds import random_state, set_random_state, stable_seed
from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import full_tensor, set_last_backward
from opsd_train.distributed.signals import StopRequest
from opsd_train.evaluation.grading import Grader, Pending
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.evaluation.rewards import Rewards, failures, grading_processes, with_grades
from opsd_train.learning_rate import make_schedule
from opsd_train.methods import METHODS, make_method
from opsd_train.methods.distill import Distill
from opsd_train.methods.teachers import LocalTeacher, refuse_unknown_teachers
from opsd_train.model.policy import load_policy, load_tokenizer
from opsd_train.reporting.collapse import CollapseMonitor
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.step_row import generated_tokens, sample_metrics
from opsd_train.reporting.step_stats import StepStats
from opsd_train.reporting.timers import PhaseTimer, peak_memory_mib
from opsd_train.rollout.ahead import Rollouts
from opsd_train.rollout.context_checks import check_context, heldout_texts
from opsd_train.rollout.engines import make_engine
from opsd_train.rollout.mixture import mixture_of
from opsd_train.rollout.trajectories import Trajectories


@dataclass(frozen=True)
class Ending:
    """What ended training before its last step."""

    signal: int | None = None
    warning: str | None = None
    """Of collapse, with collapse.action=stop or best."""


STEP_PHASES = ("rollout", "grading", "teacher", "student", "optimizer")


class Trainer:
    """Everything a training run consists of, and its progress: the state a checkpoint holds.

    `shard_mode` "full" shards the weights over the processes (FSDP2), "none" copies them to each.
    Raises UserError for a recipe that cannot be run.
    """

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        folder: RunFolder,
        timer: PhaseTimer,
        shard_mode: str,
    ) -> None:
        self.config, self.context, self.folder, self.timer = config, context, folder, timer
        train, heldout = load_problems(config.data)
        refuse_unknown_teachers(config, [*train, *heldout])
        self.data_fingerprint = fingerprint(train, heldout)
        self.tokenizer = load_tokenizer(config.model)
        self.prompts = PromptBuilder(self.tokenizer, config.prompts)
        # Problems with the lengths of their texts; those over the limits are an error or left out.
        train_lengths = self.prompts.measure(train, METHODS[config.method].required_texts(config))
        heldout = heldout[: config.evaluation.problems]
        heldout_lengths = self.prompts.measure(heldout, heldout_texts(config))
        self.problems = train_lengths.problems

        torch.manual_seed(config.seed)  # every rank initialises the same adapters
        self.policy = load_policy(config.model, config.lora, self.tokenizer, context, shard_mode)
        self.method = make_method(
            config,
            self.policy,
            self.tokenizer,
            self.problems,
            self.data_fingerprint,
            context,
            shard_mode,
        )
        check_context(
            config,
            self.policy.core.config,
            self._teacher_configs(),
            train_lengths,
            heldout_lengths,
        )
        engine = make_engine(
            config, self.policy, self.tokenizer, folder, mixture_of(config, self.method)
        )
        self.trajectories = Trajectories(config, self.method, self.prompts, engine, self.tokenizer)
        per_problem = len(self.trajectories.requests(self.problems[:1], step=1))
        refuse_more_ranks_than_samples(config.problems_per_step, per_problem, context.size)
        self.grader = Grader(workers=grading_processes())
        self.rewards = Rewards(self.grader, self.tokenizer, context)
        sees = config.prompts.teacher_context
        self.contexts = TeacherContexts(config, self.prompts) if sees else None
        self.heldout = HeldOut(
            config,
            heldout_lengths.problems,
            self.prompts,
            self.trajectories,
            self.method,
            self.rewards,
            context,
        )
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        self.schedule = make_schedule(
            self.optimizer, config.optim, config.steps, config.updates_per_step
        )
        self.order = make_order(config, self.problems)
        self.rollouts = Rollouts(config, self.order, self.trajectories, context)
        self.collapse_monitor = CollapseMonitor(config.collapse)
        self._collapse: list[str] = []  # its warnings after the last step, on rank 0
        self.steps_done = 0
        self.tokens_generated = 0  # in these steps
        self.results: dict[str, Any] = {}  # of evaluations, for summary.json
        self.evaluations: list[dict[str, Any]] = []  # the rows of evaluations.jsonl
        torch.manual_seed(stable_seed(config.seed, "dropout", context.rank))

    def fit(
        self,
        stop: StopRequest,
        *,
        evaluate: Callable[[], None],
        log: Callable[[dict[str, Any], StepStats], None],
        save: Callable[[], None],
    ) -> Ending | None:
        """Train until `config.steps` steps are done.

        `evaluate` evaluates on held-out problems, `log` records a step's metrics, `save` writes a
        checkpoint. Returns what ended training early, or None. Every rank calls it.
        """
        if self._evaluation_is_due():
            evaluate()
            if self.config.collapse.action == "best":
                save()  # the model as it was may turn out to be the best
        while self.steps_done < self.config.steps:
            row, stats = self.step(self.steps_done + 1)
            self.steps_done += 1
            log(row, stats)
            ending = self._ending(stop)
            collapsed = ending is not None and ending.signal is None
            evaluated = (ending is None and self._evaluation_is_due()) or (
                collapsed and self._can_evaluate()
            )
            if evaluated:
                evaluate()
            kept = evaluated and self.config.collapse.action == "best"
            if ending or kept or self._checkpoint_is_due():
                save()
            if ending:
                return ending
        return None

    def best_step(self, steps: Sequence[int]) -> int | None:
        """The first of these steps with the highest held-out accuracy, where collapse.action=best
        keeps its checkpoint; else None."""
        if self.config.collapse.action != "best":
            return None
        # A resumed run may ask fewer problems than before.
        count = len(self.heldout.problems)
        rows = [r for r in self.evaluations if r["step"] in steps and r["problems"] == count]
        return max(rows, key=lambda row: row["accuracy"])["step"] if rows else None

    def step(self, step: int) -> tuple[dict[str, Any], StepStats]:
        """Take training step number `step`, counted from 1. Every rank calls it.

        Returns the step's metrics and token statistics: on rank 0 of all ranks; on the others an
        empty row and their own statistics. Raises UserError if loss or gradient is not finite.
        """
        timer = self.timer
        start, seconds_before = time.perf_counter(), dict(timer.seconds)
        self.method.step = step
        with timer.phase("rollout"):
            samples, pending, update = self._rollout(step)
        if pending is not None and (self.method.needs_rewards or self.contexts):
            samples, pending = self._wait_for_grades(samples, pending), None
        if self.contexts:
            samples = self.contexts.add(step, samples)
        samples = self.method.assign_weights(samples)

        trained = [sample for sample in samples if sample.weight > 0]
        num_tokens = sum(len(sample.completion) for sample in trained)
        budget, layout = self.config.micro_batch_tokens, self.policy.layout
        own = deal(trained, layout, self.context)
        groups = balanced_micro_batches(samples, own, budget, self.context, layout)
        self.policy.model.eval()
        with timer.phase("teacher"):
            precomputed = self.method.precompute(groups)
        self.policy.model.train()
        for _ in range(self.config.updates_per_step):
            with timer.phase("student"):
                stats = self._accumulate(groups, precomputed, max(num_tokens, 1))
            with timer.phase("optimizer"):
                update |= self._update(step, stats.loss, own)

        if self.context.is_main:
            stats.add_unscored([sample for sample in samples if sample.weight == 0])
        if pending is not None:  # graded in parallel with the passes above
            samples = self._wait_for_grades(samples, pending)
            stats.set_verdicts(samples)
        all_stats = self.context.gather(stats)
        phases = {p: timer.seconds[p] - seconds_before.get(p, 0.0) for p in STEP_PHASES}
        update |= {"seconds": time.perf_counter() - start, "loss_tokens": num_tokens}
        update |= {f"seconds_{phase}": seconds for phase, seconds in phases.items()}
        if not self.context.is_main:
            return {}, stats
        stats, *others = all_stats
        stats.merge(others)
        return self._metrics(step, samples, stats, update), stats

    def state_dict(self) -> dict[str, Any]:
        """The progress besides tensors that a checkpoint keeps; JSON."""
        return {
            "data": self.data_fingerprint,
            "schedule": self.schedule.state_dict(),
            "order": self.order.state_dict(),
            "collapse": self.collapse_monitor.state_dict(),
            "tokens": self.tokens_generated,
            "seconds": self.timer.seconds | {"total": self.timer.total()},
            "results": self.results,
            "evaluations": self.evaluations,
        }

    def rank_state(self) -> dict[str, Any]:
        """The state of this rank alone; it waits for samples that are being generated."""
        return {"random": random_state(), "rollouts": self.rollouts.state()}

    def load_state_dict(
        self, steps_done: int, state: dict[str, Any], ranks: Sequence[dict[str, Any]]
    ) -> None:
        """Continue after step `steps_done`, from what `state_dict` returned then.

        `ranks`: what `rank_state` returned on each. On another number of ranks the random streams
        begin anew.
        """
        self.steps_done = steps_done
        self.schedule.load_state_dict(state["schedule"])
        self.order.load_state_dict(state["order"])
        self.collapse_monitor.load_state_dict(state["collapse"])
        self.tokens_generated = state["tokens"]
        self.timer.add(state["seconds"])
        self.results, self.evaluations = state["results"], state["evaluations"]
        self.rollouts.load_state(steps_done + 1, [rank.get("rollouts", {}) for rank in ranks])
        if len(ranks) == self.context.size:
            set_random_state(ranks[self.context.rank]["random"])

    def close(self) -> None:
        """End the grading processes, and samples that are being generated."""
        self.rollouts.close()
        self.grader.close()

    def _teacher_configs(self) -> dict[str | None, Any]:
        """The transformers configurations of other models in memory, by the teacher's name."""
        if not isinstance(self.method, Distill):
            return {}
        return {
            name: teacher.policy.core.config
            for name, teacher in self.method.teachers.items()
            if isinstance(teacher, LocalTeacher)
        }

    def _ending(self, stop: StopRequest) -> Ending | None:
        """Why training ends after this step, on every rank: a signal, or a warning of collapse."""
        warnings = [] if self.config.collapse.action == "warn" else self._collapse
        answers = self.context.all_gather((stop.signal, next(iter(warnings), None)))
        signals = [signal for signal, _ in answers if signal is not None]
        if signals:
            return Ending(signal=signals[0])
        warning = answers[0][1]
        return None if warning is None else Ending(warning=warning)

    def _can_evaluate(self) -> bool:
        """Whether there are held-out problems, and this step is not evaluated yet."""
        if not self.heldout.problems:
            return False
        # It may be in the checkpoint that the run resumed from.
        return not self.evaluations or self.evaluations[-1]["step"] != self.steps_done

    def _evaluation_is_due(self) -> bool:
        """Before training, every `evaluation.every` steps and at the end; once per step."""
        evaluation = self.config.evaluation
        if not self._can_evaluate():
            return False
        if self.steps_done == 0:
            return evaluation.at_start
        return self.steps_done == self.config.steps or self._is_multiple_of(evaluation.every)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint.every
        return self.steps_done == self.config.steps or self._is_multiple_of(every)

    def _is_multiple_of(self, every: int) -> bool:
        """Whether this many steps, a multiple of `every`, are done; never for 0."""
        return every > 0 and self.steps_done % every == 0

    def _rollout(self, step: int) -> tuple[list[Sample], Pending | None, dict[str, Any]]:
        """The step's samples of all ranks, in the same order on every rank.

        The second result is the grading of this rank's completions, already started; None for
        reference solutions. The third are metrics of the rollout.
        """
        made, pending = self.rollouts.take(step), None
        metrics: dict[str, Any] = {}
        if not self.trajectories.on_solutions(step):
            problems = [sample.problem for sample in made.own]
            pending = self.rewards.submit(problems, [sample.completion for sample in made.own])
        parts = self.context.all_gather((made.own, made.seconds))
        size, samples = self.context.size, [own for own, _ in parts]
        if pending is not None:
            generated = sum(len(sample.completion) for own in samples for sample in own)
            metrics |= {"tokens_per_second": generated / max(seconds for _, seconds in parts)}
        if self.config.rollout.ahead and self.method.source(self.config) == "student":
            metrics |= {"sample_age": made.steps_old * self.config.updates_per_step}
        ordered = [samples[index % size][index // size] for index in range(made.count)]
        return ordered, pending, metrics

    def _wait_for_grades(self, samples: list[Sample], pending: Pending) -> list[Sample]:
        """The samples with their verdicts, once all ranks have graded theirs."""
        with self.timer.phase("grading"):
            graded = with_grades(samples, self.rewards.collect(pending))
        self.order.observe([(sample.problem.id, bool(sample.correct)) for sample in graded])
        return graded

    def _accumulate(
        self, groups: Sequence[list[Sample]], precomputed: Sequence[Any], num_tokens: int
    ) -> StepStats:
        """Forward and backward of every micro-batch; gradients add up in the parameters."""
        stats = StepStats()
        for index, group in enumerate(groups):
            set_last_backward(self.policy.core, index + 1 == len(groups))
            loss, columns = self.method.loss(group, precomputed[index], num_tokens)
            loss.backward()
            if group[0].weight > 0:  # not an idle micro-batch
                stats.add(group, loss, columns)
        return stats

    def _update(self, step: int, own_loss: float, own: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step; returns its `grad_norm` (before clipping) and `lr`.

        Raises UserError, before the weights change, if loss or gradient norm is not finite.
        `own_loss` and `own` are this rank's part of the loss and the samples it is from.
        """
        limit = self.config.optim.grad_clip
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters, limit)).item()
        for name, value in (("loss", self.context.sum(own_loss)), ("gradient norm", norm)):
            if not torch.isfinite(torch.tensor(value)):
                path = self.folder.keep_batch(step, own)
                raise UserError(f"step {step}: {name} is {value}; its batch is in {path}")
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        return {"grad_norm": norm, "lr": rate}

    def _metrics(
        self, step: int, samples: Sequence[Sample], stats: StepStats, update: dict[str, Any]
    ) -> dict[str, Any]:
        """The row of metrics.jsonl, from samples and statistics of all ranks."""
        self.tokens_generated += generated_tokens(samples)
        row = {
            "loss": stats.loss,
            **stats.row(self.tokenizer),
            **sample_metrics(samples),
            "tokens": self.tokens_generated,
            "peak_mib": peak_memory_mib(self.context.device),
            **self.method.extra_metrics(samples),
            **update,
        }
        failed = failures([sample.check_failed for sample in samples])
        self._collapse = self.collapse_monitor.observe(step, row)
        return row | {"warnings": [*(f"step {step}: {line}" for line in failed), *self._collapse]}
