"""What surrounds training: the run folder, resuming, evaluations, checkpoints, the report."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from opsd_train.checkpoint.resume import Checkpoints, Loaded, restore_training
from opsd_train.checkpoint.save import training_tensors
from opsd_train.checkpoint.weights import save_adapter, save_weights
from opsd_train.config.errors import UserError
from opsd_train.config.load import to_yaml
from opsd_train.config.schema import Config
from opsd_train.data.fingerprint import difference
from opsd_train.data.problems import majority_answer
from opsd_train.data.seeds import random_state, set_random_state
from opsd_train.distributed.context import init_distributed
from opsd_train.distributed.signals import stop_requests
from opsd_train.evaluation.accuracy import over_checkpoints
from opsd_train.evaluation.rewards import failures
from opsd_train.reporting.html import write_report
from opsd_train.reporting.metrics_log import RunLogger
from opsd_train.reporting.run_folder import RunFolder, claim, release
from opsd_train.reporting.step_stats import StepStats
from opsd_train.reporting.timers import Clock, peak_memory_mib
from opsd_train.reporting.trackers import Tracker, open_trackers
from opsd_train.trainer import Trainer


def train(config: Config, *, resume: bool = False, shard: str = "full") -> int:
    """Run a recipe, or go on with it after its newest checkpoint; returns the exit code.

    The first Ctrl-C or SIGTERM ends it after the step in progress, with a checkpoint (exit code
    130 or 143); the second at once.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    clock = Clock()
    context = init_distributed(config.model.device)
    path = Path(config.output_dir)
    claimed = context.is_main and not resume
    folder = RunFolder(context.broadcast(claim(path) if claimed else path), context)
    try:
        with clock.phase("load"):
            names = config.report.trackers if context.is_main else []
            trackers = open_trackers(names, folder.path, dataclasses.asdict(config))
            run = TrainingRun(Trainer(config, context, folder, clock, shard))
            resumed = run.resume() if resume else None
    except BaseException:
        if claimed:
            release(folder.path)
        raise
    try:
        with run.recording(resumed, trackers), run.interruptible(), stop_requests() as stop:
            run.end(
                run.trainer.fit(stop, evaluate=run.evaluate, log=run.log, save=run.save_checkpoint)
            )
    finally:
        run.trainer.close()
    context.shutdown()
    return run.exit_code


class TrainingRun:
    """Reads and writes the run folder of a trainer, which keeps all state of the training."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config, self.context = trainer, trainer.config, trainer.context
        self.folder = trainer.folder.path
        self.recipe = to_yaml(self.config)
        self.checkpoints = Checkpoints(self.folder, self.config.checkpoint.keep, self.context)
        self.logger: RunLogger | None = None  # on rank 0
        self.status, self.exit_code = "failed", 1  # until it ends

    def resume(self) -> int | None:
        """Take everything over from the newest whole checkpoint; returns its step, if any."""
        trainer = self.trainer
        loaded = self.checkpoints.newest(self.recipe)
        if loaded is None:
            self._say(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return None
        self._refuse_other_origin(loaded)
        tensors = training_tensors(trainer.policy, trainer.optimizer, trainer.method.state())
        loaded.fill(tensors)
        restore_training(trainer.policy, trainer.optimizer, tensors)
        trainer.load_state_dict(loaded.step, loaded.facts)
        if loaded.rank_facts is not None:
            set_random_state(loaded.rank_facts["random"])
        self._say(f"resuming after step {loaded.step} from {loaded.path}")
        return loaded.step

    @contextmanager
    def recording(self, resumed: int | None, trackers: list[Tracker]) -> Iterator[None]:
        """Rank 0 writes metrics, and at the end, whatever it is, the summary and the report.

        `resumed`: the step after which the run goes on.
        """
        if not self.context.is_main:
            yield
            return
        with RunLogger(
            self.folder,
            self.config.steps,
            resume_step=resumed,
            evaluations=self.trainer.evaluations,
            trackers=trackers,
        ) as self.logger:
            (self.folder / "config.yaml").write_text(self.recipe, encoding="utf-8")
            self._say(f"run folder {self.folder}")
            try:
                yield
            finally:
                self.logger.summary({"status": self.status} | self._summary())
                write_report(self.folder)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """On rank 0 a second signal ends the run as the first would have, only at once."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.context.is_main:
                raise
            self._ended_by(signal.SIGINT)

    def end(self, stopped_by: int | None) -> None:
        """Training is done, or a signal stopped it: write the weights if it is done."""
        if stopped_by is not None:
            self._ended_by(stopped_by)
            return
        save_weights(self.trainer.policy, self.trainer.tokenizer, self.folder, self.context)
        if self.context.is_main:
            shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        self.status, self.exit_code = "finished", 0

    def log(self, row: dict[str, Any], stats: StepStats) -> None:
        """Record a step: its metrics, warnings and now and then some samples."""
        if self.logger is None:
            return
        step, report = self.trainer.done, self.config.report
        self.logger.log(step, row)
        for warning in row["warnings"]:
            self._say(f"warning: {warning}")
        if step % report.sample_every == 0 or step == 1:
            rows = stats.sample_rows(self.trainer.tokenizer, report.samples)
            self.logger.samples(step, rows)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the step just done. Every rank calls it."""
        trainer = self.trainer
        write_adapter = partial(save_adapter, trainer.policy, context=self.context)
        self.checkpoints.save(
            trainer.done,
            training_tensors(trainer.policy, trainer.optimizer, trainer.method.state()),
            trainer.state_dict(),
            {"random": random_state()},
            self.recipe,
            write_adapter if trainer.policy.has_adapters else None,
        )

    def evaluate(self) -> None:
        """Held-out accuracy and divergence; before training the teacher's accuracy too."""
        trainer, heldout, results = self.trainer, self.trainer.heldout, self.trainer.results
        step, clock = trainer.done, trainer.clock
        seconds = clock.total() - clock.seconds["load"] - clock.seconds["evaluate"]
        with clock.phase("evaluate"):
            made = heldout.evaluate("student")
            row = {"step": step, "tokens": trainer.tokens, "seconds": seconds} | made.row()
            if trainer.method.divergence and self.config.evaluation.divergence:
                row["divergence"] = heldout.divergence(made)
            answer, share = majority_answer(heldout.problems)
            results["majority"] = {"answer": answer, "accuracy": share}
            if step == 0:
                results |= {"before": made.summary(), "divergence_before": row.get("divergence")}
                if self.config.evaluation.teacher:
                    results["teacher"] = heldout.evaluate("teacher").summary()
            if step == self.config.steps:
                results |= {"after": made.summary(), "divergence_after": row.get("divergence")}
            trainer.evaluations.append(row)
            results |= over_checkpoints(trainer.evaluations)
            self._show_evaluation(row, made.reasons)

    def _show_evaluation(self, row: dict[str, Any], reasons: list[str | None]) -> None:
        if self.logger:
            self.logger.evaluation(row)
        for line in failures(reasons):
            self._say(f"warning: step {row['step']}, held-out problems: {line}")
        self._say(f"step {row['step']}, held-out accuracy: {row['accuracy']:.1%}")

    def _summary(self) -> dict[str, Any]:
        trainer = self.trainer
        results = {name: value for name, value in trainer.results.items() if value is not None}
        return {
            "steps": trainer.done,
            **results,
            "tokens": trainer.tokens,
            "peak_memory_mib": peak_memory_mib(self.context.device),
            "seconds": trainer.clock.seconds | {"total": trainer.clock.total()},
            "report": str(self.folder / "report.html"),
        }

    def _refuse_other_origin(self, loaded: Loaded) -> None:
        if "order" not in loaded.facts:
            raise UserError(
                f"{loaded.path} is of version 0.1, which this one cannot resume; start anew with "
                "another output_dir"
            )
        old = loaded.facts.get("data")
        if old is None:
            name = loaded.path.name
            self._say(f"warning: {name} does not say what data it is of; make sure it is the same")
        elif changed := difference(old, self.trainer.data, loaded.path):
            raise UserError(f"{changed}; restore it, or start anew with another output_dir")

    def _ended_by(self, number: int) -> None:
        self.status, self.exit_code = "interrupted", 128 + number

    def _say(self, text: str) -> None:
        if self.logger:
            self.logger.console.print(text, markup=False, soft_wrap=True)
        elif self.context.is_main:
            print(text)
