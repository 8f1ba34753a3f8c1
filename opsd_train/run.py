"""One training run: its folder, resuming, evaluations, checkpoints and the report."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers.utils import logging as transformers_logging

from opsd_train.checkpoint.resume import Checkpoint, Checkpoints, restore_training
from opsd_train.checkpoint.save import training_tensors
from opsd_train.checkpoint.weights import save_adapter, save_weights
from opsd_train.config.errors import UserError
from opsd_train.config.load import to_yaml
from opsd_train.config.schema import Config
from opsd_train.data.fingerprint import difference
from opsd_train.data.problems import majority_answer
from opsd_train.distributed.context import init_distributed
from opsd_train.distributed.signals import stop_requests
from opsd_train.evaluation.accuracy import as_summary, before_and, over_checkpoints
from opsd_train.evaluation.rewards import failures
from opsd_train.reporting.html import write_report
from opsd_train.reporting.metrics_log import RunLogger
from opsd_train.reporting.out_of_memory import explained, training_advice
from opsd_train.reporting.run_folder import RunFolder, claim, release
from opsd_train.reporting.step_stats import StepStats
from opsd_train.reporting.timers import PhaseTimer, peak_memory_mib
from opsd_train.reporting.trackers import Tracker, open_trackers
from opsd_train.trainer import Ending, Trainer


def train(config: Config, *, resume: bool = False, shard: str = "full") -> int:
    """Run a recipe, or resume it after its newest checkpoint; returns the exit code.

    `shard` "full" shards the weights over the processes (FSDP2), "none" copies them to each.
    The first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint (exit code
    130 or 143); the second ends it at once. Raises UserError for a recipe that cannot be run, and
    where a GPU has too little memory for it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    timer = PhaseTimer()
    with explained(lambda: training_advice(config, timer.failed)):
        context = init_distributed(config.model.device)
        path = Path(config.output_dir)
        claimed = context.is_main and not resume
        folder = RunFolder(context.broadcast(claim(path) if claimed else path), context)
        try:
            with timer.phase("load"):
                names = config.report.trackers if context.is_main else []
                trackers = open_trackers(names, folder.path, dataclasses.asdict(cast(Any, config)))
                run = TrainingRun(Trainer(config, context, folder, timer, shard))
                resumed_step = run.resume() if resume else None
        except BaseException:
            if claimed:
                release(folder.path)
            raise
        try:
            with (
                run.recording(resumed_step, trackers),
                run.interruptible(),
                stop_requests() as stop,
            ):
                ending = run.trainer.fit(
                    stop, evaluate=run.evaluate, log=run.log, save=run.save_checkpoint
                )
                run.finish(ending)
        finally:
            run.trainer.close()
        context.shutdown()
        return run.exit_code


class TrainingRun:
    """Reads and writes a trainer's run folder. All state of the training is in the trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config, self.context = trainer, trainer.config, trainer.context
        self.folder = trainer.folder.path
        self.recipe = to_yaml(self.config)
        self.checkpoints = Checkpoints(self.folder, self.config.checkpoint.keep, self.context)
        self.logger: RunLogger | None = None  # on rank 0, within `recording`
        self.status, self.exit_code = "failed", 1  # until the run ends some other way

    def resume(self) -> int | None:
        """Load the newest undamaged checkpoint into the trainer; returns its step.

        Returns None if there is no checkpoint. Raises UserError if the recipe or the data is not
        the one of the checkpoint.
        """
        trainer = self.trainer
        checkpoint = self.checkpoints.newest(self.recipe)
        if checkpoint is None:
            self._say(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return None
        self._refuse_other_data(checkpoint)
        tensors = training_tensors(trainer.policy, trainer.optimizer, trainer.method.state())
        checkpoint.load_tensors(tensors)
        restore_training(trainer.policy, trainer.optimizer, tensors)
        trainer.load_state_dict(checkpoint.step, checkpoint.trainer_state, checkpoint.rank_states)
        self._say(f"resuming after step {checkpoint.step} from {checkpoint.path}")
        return checkpoint.step

    @contextmanager
    def recording(self, resumed_step: int | None, trackers: list[Tracker]) -> Iterator[None]:
        """Within this context rank 0 logs metrics; on exit, even after an error, it writes the
        summary and the report.

        `resumed_step`: the step of the checkpoint that the run resumed from, or None.
        """
        if not self.context.is_main:
            yield
            return
        with RunLogger(
            self.folder,
            self.config.steps,
            resume_step=resumed_step,
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
        """Within this context rank 0 takes a second signal as a normal end of the run, too."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.context.is_main:
                raise
            self._ended_by(signal.SIGINT)

    def finish(self, ending: Ending | None) -> None:
        """Set the status; unless a signal ended training, write the trained weights, those of the
        best checkpoint where collapse.action=best ended it. Every rank calls it.
        """
        if ending is not None and ending.signal is not None:
            self._ended_by(ending.signal)
            return
        if ending is not None:
            self._stop_early()
        save_weights(self.trainer.policy, self.trainer.tokenizer, self.folder, self.context)
        if self.context.is_main:
            shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        self.status, self.exit_code = "finished" if ending is None else "stopped", 0

    def log(self, row: dict[str, Any], stats: StepStats) -> None:
        """Record a step: metrics, warnings, and every `report.sample_every` steps some samples."""
        if self.logger is None:
            return
        step, report = self.trainer.steps_done, self.config.report
        self.logger.log(step, row)
        for warning in row["warnings"]:
            self._say(f"warning: {warning}")
        if step % report.sample_every == 0 or step == 1:
            rows = stats.sample_rows(self.trainer.tokenizer, report.samples)
            self.logger.samples(step, rows)

    def save_checkpoint(self) -> None:
        """Write a checkpoint after the last finished step. Every rank calls it."""
        trainer = self.trainer
        trainer.results["peak_memory_mib"] = self._peak_memory()
        write_adapter = partial(save_adapter, trainer.policy, context=self.context)
        self.checkpoints.save(
            trainer.steps_done,
            training_tensors(trainer.policy, trainer.optimizer, trainer.method.state()),
            trainer.state_dict(),
            trainer.rank_state(),
            self.recipe,
            write_adapter if trainer.policy.has_adapters else None,
            best=trainer.best_step([*self.checkpoints.steps(), trainer.steps_done]),
        )

    def evaluate(self) -> None:
        """Evaluate on the held-out problems: accuracy and divergence. Every rank calls it.

        Before training it also evaluates under the teacher's prompt, if the recipe asks for that.
        """
        trainer, heldout, results = self.trainer, self.trainer.heldout, self.trainer.results
        step, timer = trainer.steps_done, trainer.timer
        training_seconds = timer.total() - timer.seconds["load"] - timer.seconds["evaluate"]
        with timer.phase("evaluate"):
            student = heldout.evaluate("student")
            row: dict[str, Any] = {"step": step, "tokens": trainer.tokens_generated}
            row |= {"seconds": training_seconds} | student.row()
            if trainer.method.divergence and self.config.evaluation.divergence:
                row["divergence"] = heldout.divergence(student)
            answer, share = majority_answer(heldout.problems)
            results["majority"] = {"answer": answer, "accuracy": share}
            if step == 0:
                results |= {"before": student.summary(), "divergence_before": row.get("divergence")}
                if self.config.evaluation.teacher:
                    results["teacher"] = heldout.evaluate("teacher").summary()
            if step == self.config.steps:
                results |= {"after": student.summary(), "divergence_after": row.get("divergence")}
            trainer.evaluations.append(row)
            results |= over_checkpoints(trainer.evaluations)
            self._record_evaluation(row, student.reasons)

    def _record_evaluation(self, row: dict[str, Any], reasons: list[str | None]) -> None:
        if self.logger:
            self.logger.evaluation(row)
        for line in failures(reasons):
            self._say(f"warning: step {row['step']}, held-out problems: {line}")
        self._say(f"step {row['step']}, held-out accuracy: {row['accuracy']:.1%}")

    def _summary(self) -> dict[str, Any]:
        trainer = self.trainer
        results = {name: value for name, value in trainer.results.items() if value is not None}
        return {
            "steps": trainer.steps_done,
            **results,
            "tokens": trainer.tokens_generated,
            "peak_memory_mib": self._peak_memory(),
            "seconds": trainer.timer.seconds | {"total": trainer.timer.total()},
            "report": str(self.folder / "report.html"),
        }

    def _peak_memory(self) -> float:
        """The peak in MiB of this process and of those that the run resumed from."""
        earlier = self.trainer.results.get("peak_memory_mib", 0.0)
        return max(earlier, peak_memory_mib(self.context.device))

    def _stop_early(self) -> None:
        """Say that a warning of collapse ended the run; go back to the best checkpoint."""
        trainer = self.trainer
        best = trainer.best_step(self.checkpoints.steps())
        said = f"stopped after step {trainer.steps_done} by the warning above"
        if best is not None:
            tensors = training_tensors(trainer.policy, trainer.optimizer, trainer.method.state())
            self.checkpoints.whole(best).load_tensors(tensors)
            restore_training(trainer.policy, trainer.optimizer, tensors)
            trainer.results["weights_of_step"] = best
            said += f"; the weights are those of step {best}"
        of_step = trainer.steps_done if best is None else best
        rows = {row["step"]: row for row in trainer.evaluations}
        if row := rows.get(of_step):
            trainer.results |= {"after": as_summary(row), "divergence_after": row.get("divergence")}
            trainer.results |= before_and(row, rows.get(0))
            said += f", held-out accuracy {row['accuracy']:.1%}"
            said += "" if best is None else ", chosen on these very problems: biased upwards"
        trainer.results["stopped"] = said
        self._say(said)

    def _refuse_other_data(self, checkpoint: Checkpoint) -> None:
        old = checkpoint.trainer_state.get("data")
        if old is None:
            name = checkpoint.path.name
            self._say(f"warning: {name} does not say what data it is of; make sure it is the same")
        elif changed := difference(old, self.trainer.data_fingerprint, checkpoint.path):
            raise UserError(f"{changed}; restore it, or start a new run with another output_dir")

    def _ended_by(self, signal_number: int) -> None:
        self.status, self.exit_code = "interrupted", 128 + signal_number

    def _say(self, text: str) -> None:
        if self.logger:
            self.logger.console.print(text, markup=False, soft_wrap=True)
        elif self.context.is_main:
            print(text, flush=True)
