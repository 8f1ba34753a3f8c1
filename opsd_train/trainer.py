"""One training step; `run.Run` repeats it.

A step: problems -> prompts -> one rollout call -> weights of the samples -> micro-batches by token
budget -> what the method needs without gradient -> loss over hidden states at completion
positions -> backward -> clip, AdamW, schedule -> metrics. The loss is a mean over all loss tokens
of the step, however it is cut and over however many processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample, even_groups
from opsd_train.data.fingerprint import fingerprint
from opsd_train.data.order import make_sampler
from opsd_train.data.problems import load_problems
from opsd_train.data.prompts import PromptBuilder
from opsd_train.data.seeds import stable_seed
from opsd_train.distributed.context import World
from opsd_train.distributed.fsdp import set_last_backward, whole
from opsd_train.evaluation.grading import Grader, Pending
from opsd_train.evaluation.heldout import HeldOut
from opsd_train.evaluation.rewards import Rewards, failures, grading_processes, with_grades
from opsd_train.learning_rate import make_schedule
from opsd_train.methods import METHODS, make_method
from opsd_train.model.policy import load_policy, load_tokenizer
from opsd_train.reporting.collapse import Watch
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.step_stats import StepStats
from opsd_train.reporting.timers import Clock, peak_memory_mib
from opsd_train.rollout.context_checks import check_context, heldout_sides
from opsd_train.rollout.engines import make_engine
from opsd_train.rollout.trajectories import Trajectories

STEP_PHASES = ("rollout", "grading", "teacher", "student", "optimizer")


class Trainer:
    """A policy with its method, optimizer, engine and problems, and the steps they take."""

    def __init__(
        self, config: Config, world: World, folder: RunFolder, clock: Clock, shard_mode: str
    ) -> None:
        self.config, self.world, self.folder, self.clock = config, world, folder, clock
        kind = METHODS[config.method]
        train, heldout = load_problems(config.data)
        self.data = fingerprint(train, heldout)
        self.tokenizer = load_tokenizer(config.model)
        self.prompts = PromptBuilder(self.tokenizer, config.prompts)
        measured = self.prompts.measure(train, kind.sides(config))
        asked = self.prompts.measure(heldout[: config.evaluation.problems], heldout_sides(config))
        self.problems = measured.problems
        torch.manual_seed(config.seed)  # adapters start alike on every rank
        self.policy = load_policy(config.model, config.lora, self.tokenizer, world, shard_mode)
        self.method = make_method(config, self.policy, self.tokenizer, world, shard_mode)
        readers = {"model": self.policy} | (
            {"teacher": self.method.teacher} if config.distill else {}
        )
        configs = {name: policy.core.config for name, policy in readers.items()}
        check_context(config, configs, measured, asked)
        engine = make_engine(config, self.policy, self.tokenizer, folder)
        self.trajectories = Trajectories(config, self.method, self.prompts, engine, self.tokenizer)
        made = len(self.trajectories.jobs(self.problems[:1])) * config.problems_per_step
        if made < world.size:
            raise UserError(
                f"problems_per_step={config.problems_per_step} gives {made} samples, fewer than "
                f"the {world.size} processes; raise it"
            )
        self.grader = Grader(workers=grading_processes())
        self.rewards = Rewards(self.grader, self.tokenizer, world)
        self.heldout = HeldOut(
            config,
            asked.problems,
            self.prompts,
            self.trajectories,
            self.method,
            self.rewards,
            world,
        )
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        self.schedule = make_schedule(
            self.optimizer, config.optim, config.steps, self.method.updates
        )
        self.sampler = make_sampler(config, self.problems)
        self.watch = Watch(config.watch)
        self.tokens = 0
        torch.manual_seed(stable_seed(config.seed, "dropout", world.rank))

    def step(self, step: int) -> tuple[dict[str, Any], StepStats]:
        """One step; on rank 0 its metrics row and the statistics of all ranks."""
        marks, started = dict(self.clock.seconds), time.perf_counter()
        with self.clock.phase("rollout"):
            samples, pending = self._samples(step)
        if pending and self.method.needs_rewards:
            samples, pending = self._judged(samples, pending), None
        samples = self.method.weigh(samples)
        active = sorted((s for s in samples if s.weight > 0), key=lambda sample: sample.longest)
        num_tokens = sum(len(sample.completion) for sample in active)
        active = active[self.world.rank :: self.world.size]  # alike in length on every rank
        budget, packed = self.config.micro_batch_tokens, self.policy.packed
        groups = even_groups(samples, active, budget, self.world, packed)
        self.policy.model.eval()
        with self.clock.phase("teacher"):
            prepared = self.method.prepare(groups)
        self.policy.model.train()
        for _ in range(self.method.updates):
            stats = StepStats()
            with self.clock.phase("student"):
                self._accumulate(groups, prepared, max(num_tokens, 1), stats)
            with self.clock.phase("optimizer"):
                changes = self._update(step, stats, active)
        if self.world.leads:
            stats.add_unscored([sample for sample in samples if sample.weight == 0])
        if pending:  # the check went on beside the passes
            samples = self._judged(samples, pending)
            stats.judge(samples)
        everything = self.world.gather(stats)
        took = {name: self.clock.seconds[name] - marks.get(name, 0.0) for name in STEP_PHASES}
        changes |= {"seconds": time.perf_counter() - started, "loss_tokens": num_tokens}
        changes |= {f"seconds_{name}": seconds for name, seconds in took.items()}
        row = self._row(step, samples, everything, changes)
        return row, everything[0] if self.world.leads else stats

    def close(self) -> None:
        """End the processes beside this one."""
        self.grader.close()

    def _samples(self, step: int) -> tuple[list[Sample], Pending | None]:
        """The step's samples, those of all ranks in the same order on every rank; the grades that
        this rank's will get, where they were generated."""
        jobs = self.trajectories.jobs(self.sampler.draw(step))
        made = self.trajectories.make(step, jobs[self.world.rank :: self.world.size])
        pending = None
        if self.method.source(self.config) != "reference":
            answers = [sample.problem for sample in made], [sample.completion for sample in made]
            pending = self.rewards.submit(*answers)
        samples: list[Sample] = [None] * len(jobs)
        for rank, part in enumerate(self.world.all_gather(made)):
            samples[rank :: self.world.size] = part
        return samples, pending

    def _judged(self, samples: list[Sample], pending: Pending) -> list[Sample]:
        """The samples with their verdicts, as soon as all ranks have them."""
        with self.clock.phase("grading"):
            judged = with_grades(samples, self.rewards.collect(pending))
        self.sampler.observe([(sample.problem.id, sample.correct) for sample in judged])
        return judged

    def _accumulate(
        self, groups: Sequence[list[Sample]], prepared: list, num_tokens: int, stats: StepStats
    ) -> None:
        """Add the gradients of all micro-batches."""
        for index, group in enumerate(groups):
            set_last_backward(self.policy.core, index + 1 == len(groups))
            loss, columns = self.method.loss(group, prepared[index], num_tokens)
            loss.backward()
            if group[0].weight > 0:  # not an idle one
                stats.add(group, loss, columns)

    def _update(self, step: int, stats: StepStats, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step, unless it would spoil the weights."""
        limit = self.config.optim.grad_clip
        norm = whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters, limit)).item()
        loss = self.world.sum(stats.loss)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not torch.isfinite(torch.tensor(value)):
                path = self.folder.keep_batch(step, samples)
                raise UserError(f"step {step}: {name} is {value}; its batch is in {path}")
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.updated()
        return {"grad_norm": norm, "lr": rate}

    def _row(
        self,
        step: int,
        samples: Sequence[Sample],
        parts: Sequence[StepStats],
        changes: dict[str, Any],
    ) -> dict[str, Any]:
        """The metrics of a step, on rank 0, which has the statistics of all ranks."""
        if not self.world.leads:
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
            "peak_mib": peak_memory_mib(self.world.device),
            **self.method.facts(samples),
            **changes,
        }
        failed = failures([sample.check_failed for sample in samples])
        warnings = [f"step {step}: {line}" for line in failed]
        return row | {"warnings": [*warnings, *self.watch.observe(step, row)]}
