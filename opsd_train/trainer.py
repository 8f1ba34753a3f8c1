"""The training loop and its step.

A step: problems -> prompts -> one rollout call -> weights of the samples -> micro-batches by token
budget -> what the method needs without gradient -> loss over hidden states at completion
positions -> backward -> clip, AdamW, schedule -> metrics. The loss is a mean over all loss tokens
of the step, however it is cut and over however many processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample, balanced_micro_batches
from opsd_train.data.fingerprint import fingerprint
from opsd_train.data.order import make_order
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.data.seeds import stable_seed
from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import full_tensor, set_last_backward
from opsd_train.distributed.signals import StopRequest
from opsd_train.evaluation.grading import Grader, Pending
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.evaluation.rewards import Rewards, failures, grading_processes, with_grades
from opsd_train.learning_rate import make_schedule
from opsd_train.methods import METHODS, make_method
from opsd_train.model.policy import load_policy, load_tokenizer
from opsd_train.reporting.collapse import CollapseMonitor
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.step_stats import StepStats
from opsd_train.reporting.timers import Clock, peak_memory_mib
from opsd_train.rollout.context_checks import check_context, heldout_texts
from opsd_train.rollout.engines import make_engine
from opsd_train.rollout.trajectories import Trajectories

STEP_PHASES = ("rollout", "grading", "teacher", "student", "optimizer")


class Trainer:
    """A policy with its method, optimizer, engine and problems, and how far training has come."""

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        folder: RunFolder,
        clock: Clock,
        shard_mode: str,
    ) -> None:
        self.config, self.context, self.folder, self.clock = config, context, folder, clock
        kind = METHODS[config.method]
        train, heldout = load_problems(config.data)
        self.data = fingerprint(train, heldout)
        self.tokenizer = load_tokenizer(config.model)
        self.prompts = PromptBuilder(self.tokenizer, config.prompts)
        measured = self.prompts.measure(train, kind.required_texts(config))
        asked = self.prompts.measure(heldout[: config.evaluation.problems], heldout_texts(config))
        self.problems = measured.problems
        torch.manual_seed(config.seed)  # adapters start alike on every rank
        self.policy = load_policy(config.model, config.lora, self.tokenizer, context, shard_mode)
        self.method = make_method(config, self.policy, self.tokenizer, context, shard_mode)
        readers = {"model": self.policy} | (
            {"teacher": self.method.teacher} if config.distill else {}
        )
        configs = {name: policy.core.config for name, policy in readers.items()}
        check_context(config, configs, measured, asked)
        engine = make_engine(config, self.policy, self.tokenizer, folder)
        self.trajectories = Trajectories(config, self.method, self.prompts, engine, self.tokenizer)
        made = len(self.trajectories.requests(self.problems[:1])) * config.problems_per_step
        if made < context.size:
            raise UserError(
                f"problems_per_step={config.problems_per_step} gives {made} samples, fewer than "
                f"the {context.size} processes; raise it"
            )
        self.grader = Grader(workers=grading_processes())
        self.rewards = Rewards(self.grader, self.tokenizer, context)
        self.heldout = HeldOut(
            config,
            asked.problems,
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
            self.optimizer, config.optim, config.steps, self.method.updates
        )
        self.order = make_order(config, self.problems)
        self.collapse_monitor = CollapseMonitor(config.collapse)
        self.done = 0  # steps
        self.tokens = 0  # generated in them
        self.results: dict[str, Any] = {}  # of evaluations, for the summary
        self.evaluations: list[dict[str, Any]] = []  # the rows of evaluations.jsonl
        torch.manual_seed(stable_seed(config.seed, "dropout", context.rank))

    def fit(
        self,
        stop: StopRequest,
        *,
        evaluate: Callable[[], None],
        log: Callable[[dict[str, Any], StepStats], None],
        save: Callable[[], None],
    ) -> int | None:
        """Train until `config.steps` are done; returns the signal that ended it early, or None.

        `evaluate` measures held-out problems, `log` records a step's metrics, `save` writes a
        checkpoint. Every rank calls it.
        """
        if self._evaluation_is_due():
            evaluate()
        while self.done < self.config.steps:
            row, stats = self.step(self.done + 1)
            self.done += 1
            log(row, stats)
            signals = [n for n in self.context.all_gather(stop.signal) if n is not None]
            if not signals and self._evaluation_is_due():
                evaluate()
            every = self.config.checkpoint.every
            if signals or self.done == self.config.steps or (every and self.done % every == 0):
                save()
            if signals:
                return signals[0]
        return None

    def step(self, step: int) -> tuple[dict[str, Any], StepStats]:
        """One step; on rank 0 its metrics row and the statistics of all ranks."""
        marks, started = dict(self.clock.seconds), time.perf_counter()
        with self.clock.phase("rollout"):
            samples, pending = self._samples(step)
        if pending and self.method.needs_rewards:
            samples, pending = self._judged(samples, pending), None
        samples = self.method.assign_weights(samples)
        active = sorted((s for s in samples if s.weight > 0), key=lambda sample: sample.longest)
        num_tokens = sum(len(sample.completion) for sample in active)
        active = active[self.context.rank :: self.context.size]  # alike in length on every rank
        budget, packed = self.config.micro_batch_tokens, self.policy.packed
        groups = balanced_micro_batches(samples, active, budget, self.context, packed)
        self.policy.model.eval()
        with self.clock.phase("teacher"):
            precomputed = self.method.precompute(groups)
        self.policy.model.train()
        for _ in range(self.method.updates):
            stats = StepStats()
            with self.clock.phase("student"):
                self._accumulate(groups, precomputed, max(num_tokens, 1), stats)
            with self.clock.phase("optimizer"):
                changes = self._update(step, stats, active)
        if self.context.is_main:
            stats.add_unscored([sample for sample in samples if sample.weight == 0])
        if pending:  # the check went on beside the passes
            samples = self._judged(samples, pending)
            stats.judge(samples)
        everything = self.context.gather(stats)
        took = {name: self.clock.seconds[name] - marks.get(name, 0.0) for name in STEP_PHASES}
        changes |= {"seconds": time.perf_counter() - started, "loss_tokens": num_tokens}
        changes |= {f"seconds_{name}": seconds for name, seconds in took.items()}
        row = self._row(step, samples, everything, changes)
        return row, everything[0] if self.context.is_main else stats

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the tensors, as JSON takes it."""
        return {
            "data": self.data,
            "schedule": self.schedule.state_dict(),
            "order": self.order.state_dict(),
            "collapse": self.collapse_monitor.state_dict(),
            "tokens": self.tokens,
            "seconds": self.clock.seconds | {"total": self.clock.total()},
            "results": self.results,
            "evaluations": self.evaluations,
        }

    def load_state_dict(self, done: int, state: dict[str, Any]) -> None:
        """Go on after step `done` from a state of `state_dict`."""
        self.done = done
        self.schedule.load_state_dict(state["schedule"])
        self.order.load_state_dict(state["order"])
        self.collapse_monitor.load_state_dict(state["collapse"])
        self.tokens = state["tokens"]
        self.clock.add(state["seconds"])
        self.results, self.evaluations = state["results"], state["evaluations"]

    def close(self) -> None:
        """End the processes beside this one."""
        self.grader.close()

    def _evaluation_is_due(self) -> bool:
        """Before training, every so many steps, and after it; not twice at the same step."""
        evaluation = self.config.evaluation
        if self.done == 0:
            due = evaluation.at_start
        else:
            between = evaluation.every and self.done % evaluation.every == 0
            due = between or self.done == self.config.steps
        known = self.evaluations and self.evaluations[-1]["step"] == self.done
        return bool(self.heldout.problems and due and not known)

    def _samples(self, step: int) -> tuple[list[Sample], Pending | None]:
        """The step's samples, those of all ranks in the same order on every rank; the grades that
        this rank's will get, where they were generated."""
        requests = self.trajectories.requests(self.order.draw(step))
        made = self.trajectories.make(step, requests[self.context.rank :: self.context.size])
        pending = None
        if self.method.source(self.config) != "solution":
            answers = [sample.problem for sample in made], [sample.completion for sample in made]
            pending = self.rewards.submit(*answers)
        samples: list[Sample] = [None] * len(requests)
        for rank, part in enumerate(self.context.all_gather(made)):
            samples[rank :: self.context.size] = part
        return samples, pending

    def _judged(self, samples: list[Sample], pending: Pending) -> list[Sample]:
        """The samples with their verdicts, as soon as all ranks have them."""
        with self.clock.phase("grading"):
            judged = with_grades(samples, self.rewards.collect(pending))
        self.order.observe([(sample.problem.id, sample.correct) for sample in judged])
        return judged

    def _accumulate(
        self, groups: Sequence[list[Sample]], precomputed: list, num_tokens: int, stats: StepStats
    ) -> None:
        """Add the gradients of all micro-batches."""
        for index, group in enumerate(groups):
            set_last_backward(self.policy.core, index + 1 == len(groups))
            loss, columns = self.method.loss(group, precomputed[index], num_tokens)
            loss.backward()
            if group[0].weight > 0:  # not an idle one
                stats.add(group, loss, columns)

    def _update(self, step: int, stats: StepStats, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step, unless it would spoil the weights."""
        limit = self.config.optim.grad_clip
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters, limit)).item()
        loss = self.context.sum(stats.loss)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not torch.isfinite(torch.tensor(value)):
                path = self.folder.keep_batch(step, samples)
                raise UserError(f"step {step}: {name} is {value}; its batch is in {path}")
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        return {"grad_norm": norm, "lr": rate}

    def _row(
        self,
        step: int,
        samples: Sequence[Sample],
        parts: Sequence[StepStats],
        changes: dict[str, Any],
    ) -> dict[str, Any]:
        """The metrics of a step, on rank 0, which has the statistics of all ranks."""
        if not self.context.is_main:
            return {}
        stats, *others = parts
        stats.merge(others)
        row = {"loss": stats.loss, **stats.row(self.tokenizer)}
        checked = [sample.correct for sample in samples if sample.correct is not None]
        if checked:
            generated = sum(len(sample.completion) for sample in samples)
            self.tokens += generated
            row |= {
                "accuracy": sum(checked) / len(checked),
                "failed_checks": sum(sample.check_failed is not None for sample in samples),
                "truncated": sum(not sample.finished for sample in samples) / len(samples),
                "tokens_per_second": generated / changes["seconds_rollout"],
            }
        row |= {
            "completion_length": sum(len(s.completion) for s in samples) / len(samples),
            "trained": sum(sample.weight > 0 for sample in samples) / len(samples),
            "tokens": self.tokens,
            "peak_mib": peak_memory_mib(self.context.device),
            **self.method.extra_metrics(samples),
            **changes,
        }
        failed = failures([sample.check_failed for sample in samples])
        warnings = [f"step {step}: {line}" for line in failed]
        return row | {"warnings": [*warnings, *self.collapse_monitor.observe(step, row)]}
