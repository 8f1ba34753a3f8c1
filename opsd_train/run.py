"""A run from start to report: its folder, its evaluations, its checkpoints, its end."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from opsd_train.checkpoint.save import Checkpoints, Loaded, restore_training, training_tensors
from opsd_train.checkpoint.weights import save_adapter, save_weights
from opsd_train.config.errors import UserError
from opsd_train.config.load import to_yaml
from opsd_train.config.schema import Config
from opsd_train.data.fingerprint import difference
from opsd_train.data.problems import majority_answer
from opsd_train.distributed.context import start
from opsd_train.distributed.signals import StopRequest, stop_requests
from opsd_train.evaluation.accuracy import over_checkpoints
from opsd_train.evaluation.rewards import failures
from opsd_train.reporting.html import write_report
from opsd_train.reporting.metrics_log import RunLogger
from opsd_train.reporting.run_folder import RunFolder, claim, release
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
    world = start(config.model.device)
    path = Path(config.output_dir)
    claimed = world.leads and not resume
    folder = RunFolder(world.broadcast(claim(path) if claimed else path), world)
    try:
        with clock.phase("load"):
            names = config.report.trackers if world.leads else []
            trackers = open_trackers(names, folder.path, dataclasses.asdict(config))
            run = Run(Trainer(config, world, folder, clock, shard))
            if resume:
                run.resume()
    except BaseException:
        if claimed:
            release(folder.path)
        raise
    try:
        code = run.go(trackers)
    finally:
        run.trainer.close()
    world.leave()
    return code


class Run:
    """One trainer's way to the end of its recipe."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config, self.world = trainer, trainer.config, trainer.world
        self.folder = trainer.folder.path
        self.recipe = to_yaml(self.config)
        self.checkpoints = Checkpoints(self.folder, self.config.checkpoint.keep, self.world)
        self.done = 0  # steps
        self.resumed: int | None = None  # the step after which it goes on
        self.results: dict[str, Any] = {}  # for the summary
        self.evaluations: list[dict[str, Any]] = []  # the rows of evaluations.jsonl
        self.logger: RunLogger | None = None  # on rank 0

    def resume(self) -> None:
        """Take everything over from the newest checkpoint that is whole."""
        trainer = self.trainer
        loaded: Loaded | None = self.checkpoints.newest(self.recipe)
        if loaded is None:
            self._say(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return
        self._refuse_other_data(loaded)
        tensors = training_tensors(trainer.policy, trainer.optimizer, trainer.method.state())
        loaded.fill(tensors)
        restore_training(trainer.policy, trainer.optimizer, tensors)
        facts = loaded.facts
        trainer.schedule.load_state_dict(facts["schedule"])
        trainer.sampler.load_state_dict(facts["sampler"])
        trainer.watch.load_state_dict(facts["watch"])
        trainer.tokens = facts["tokens"]
        trainer.clock.add(facts["seconds"])
        self.results, self.evaluations = facts["results"], facts["evaluations"]
        self.done = self.resumed = loaded.step
        if loaded.rank_facts is not None:
            _set_random_state(loaded.rank_facts["random"])
        self._say(f"resuming after step {loaded.step} from {loaded.path}")

    def _refuse_other_data(self, loaded: Loaded) -> None:
        old = loaded.facts.get("data")
        if old is None:
            name = loaded.path.name
            self._say(f"warning: {name} does not say what data it is of; make sure it is the same")
        elif changed := difference(old, self.trainer.data, loaded.path):
            raise UserError(f"{changed}; restore it, or start anew with another output_dir")

    def go(self, trackers: list[Tracker]) -> int:
        """Train to the end, or until a signal; leave a folder that tells which."""
        summary: dict[str, Any] = {"status": "failed"}
        if not self.world.leads:
            with stop_requests() as stop:
                return _exit_code(self._train(stop))
        with RunLogger(
            self.folder,
            self.config.steps,
            resume_step=self.resumed,
            evaluations=self.evaluations,
            trackers=trackers,
        ) as self.logger:
            (self.folder / "config.yaml").write_text(self.recipe, encoding="utf-8")
            self._say(f"run folder {self.folder}")
            number = None
            try:
                with stop_requests() as stop:
                    number = self._train(stop)
                summary["status"] = "finished" if number is None else "interrupted"
            except KeyboardInterrupt:
                number = signal.SIGINT
                summary["status"] = "interrupted"
            finally:
                self.logger.summary(summary | self._summary())
                write_report(self.folder)
        return _exit_code(number)

    def _train(self, stop: StopRequest) -> int | None:
        """Returns the signal that ended it early."""
        config, world = self.config, self.world
        self._evaluate_if_due()
        while self.done < config.steps:
            row, stats = self.trainer.step(self.done + 1)
            self.done += 1
            if self.logger:
                self._log(row, stats)
            signals = [number for number in world.all_gather(stop.signal) if number is not None]
            if not signals:
                self._evaluate_if_due()
            every = config.checkpoint.every
            if signals or self.done == config.steps or (every and self.done % every == 0):
                self._save()
            if signals:
                return signals[0]
        save_weights(self.trainer.policy, self.trainer.tokenizer, self.folder, world)
        if world.leads:
            shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        return None

    def _log(self, row: dict[str, Any], stats: Any) -> None:
        report = self.config.report
        self.logger.log(self.done, row)
        for warning in row["warnings"]:
            self._say(f"warning: {warning}")
        if self.done % report.sample_every == 0 or self.done == 1:
            rows = stats.sample_rows(self.trainer.tokenizer, report.samples)
            self.logger.samples(self.done, rows)

    def _save(self) -> None:
        trainer = self.trainer
        facts = {
            "data": trainer.data,
            "schedule": trainer.schedule.state_dict(),
            "sampler": trainer.sampler.state_dict(),
            "watch": trainer.watch.state_dict(),
            "tokens": trainer.tokens,
            "seconds": trainer.clock.seconds | {"total": trainer.clock.total()},
            "results": self.results,
            "evaluations": self.evaluations,
        }
        self.checkpoints.save(
            self.done,
            training_tensors(trainer.policy, trainer.optimizer, trainer.method.state()),
            facts,
            {"random": _random_state()},
            self.recipe,
            self._write_adapter if trainer.policy.has_adapters else None,
        )

    def _write_adapter(self, folder: Path) -> None:
        save_adapter(self.trainer.policy, folder, self.world)

    def _evaluate_if_due(self) -> None:
        """Before training, every so many steps, and after it; not twice at the same step."""
        heldout, evaluation = self.trainer.heldout, self.config.evaluation
        between = evaluation.every and self.done % evaluation.every == 0
        due = between or self.done == self.config.steps
        if self.done == 0:
            due = evaluation.at_start
        known = self.evaluations and self.evaluations[-1]["step"] == self.done
        if heldout.problems and due and not known:
            with self.trainer.clock.phase("evaluate"):
                self._evaluate()

    def _evaluate(self) -> None:
        """Held-out accuracy and divergence; before training the teacher's accuracy too."""
        trainer, heldout, results = self.trainer, self.trainer.heldout, self.results
        clock = trainer.clock
        seconds = clock.total() - clock.seconds["load"] - clock.seconds["evaluate"]
        made = heldout.evaluate("student")
        row = {"step": self.done, "tokens": trainer.tokens, "seconds": seconds} | made.row()
        if trainer.method.divergence and self.config.evaluation.divergence:
            row["divergence"] = heldout.divergence(made)
        answer, share = majority_answer(heldout.problems)
        results["majority"] = {"answer": answer, "accuracy": share}
        if self.done == 0:
            results |= {"before": made.summary(), "divergence_before": row.get("divergence")}
            if self.config.evaluation.teacher:
                results["teacher"] = heldout.evaluate("teacher").summary()
        if self.done == self.config.steps:
            results |= {"after": made.summary(), "divergence_after": row.get("divergence")}
        self.evaluations.append(row)
        results |= over_checkpoints(self.evaluations)
        if self.logger:
            self.logger.evaluation(row)
        for line in failures(made.reasons):
            self._say(f"warning: step {self.done}, held-out problems: {line}")
        self._say(f"step {self.done}, held-out accuracy: {row['accuracy']:.1%}")

    def _summary(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "steps": self.done,
            **{name: value for name, value in self.results.items() if value is not None},
            "tokens": trainer.tokens,
            "peak_memory_mib": peak_memory_mib(self.world.device),
            "seconds": trainer.clock.seconds | {"total": trainer.clock.total()},
            "report": str(self.folder / "report.html"),
        }

    def _say(self, text: str) -> None:
        if self.logger:
            self.logger.console.print(text, markup=False, soft_wrap=True)
        elif self.world.leads:
            print(text)


def _random_state() -> dict[str, torch.Tensor]:
    cuda = torch.cuda.is_available()
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if cuda else {})


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _exit_code(number: int | None) -> int:
    return 0 if number is None else 128 + number
