"""The training loop, written straight down.

A step: problems -> prompts -> one rollout call -> micro-batches by token budget -> teacher and
student hidden states at completion positions -> loss -> backward -> clip, AdamW, schedule ->
metrics. The loss is a mean over all loss tokens of the step, however it is cut.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.utils import logging as transformers_logging

from opsd_train.batches import Sample, micro_batches
from opsd_train.config import Config, to_yaml
from opsd_train.data import Problem, load_problems, majority_answer
from opsd_train.errors import UserError
from opsd_train.evaluation.accuracy import Evaluation, evaluate
from opsd_train.evaluation.intervals import paired_difference
from opsd_train.methods import opsd
from opsd_train.metrics import RunLogger
from opsd_train.model import add_adapters, load_model, load_tokenizer, resolve_device
from opsd_train.prompts import PromptBuilder
from opsd_train.report import write_report
from opsd_train.rewards import extract_answer, is_correct
from opsd_train.rollout import make_engine
from opsd_train.step_stats import StepStats

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def train(config: Config) -> int:
    """Run a recipe from start to report; returns the process's exit code.

    Ctrl-C ends it early with everything up to that step in the run folder (exit code 130).
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    clock = Clock()
    with clock.phase("load"):
        trainer = Trainer(config, clock)
    run_dir = trainer.run_dir
    with RunLogger(run_dir, config.steps) as logger:
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        logger.console.print(f"run folder {run_dir}", markup=False, soft_wrap=True)
        summary: dict[str, Any] = {"status": "failed", "steps": 0}
        try:
            trainer.run(logger, summary)
            summary["status"] = "finished"
        except KeyboardInterrupt:
            summary["status"] = "interrupted"
        finally:
            summary |= {
                "tokens": trainer.tokens,
                "peak_memory_mib": peak_memory_mib(trainer.device),
                "seconds": clock.seconds | {"total": clock.total()},
                "report": str(run_dir / "report.html"),
            }
            if trainer.tokens:
                trainer.model.save_pretrained(str(run_dir / "adapter"), save_embedding_layers=False)
            logger.summary(summary)
            write_report(run_dir)
    return 130 if summary["status"] == "interrupted" else 0


class Trainer:
    """A model with its adapters, optimizer, engine and problems, and the steps they take."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.run_dir = unused_folder(Path(config.output_dir))
        self.device = resolve_device(config.model.device)
        train_problems, heldout = load_problems(config.data)
        self.tokenizer = load_tokenizer(config.model)
        self.prompts = PromptBuilder(self.tokenizer, config.prompts)
        self.problems = self.prompts.filter(train_problems)
        self.heldout = self.prompts.filter(heldout[: config.evaluation.problems])
        torch.manual_seed(config.seed)
        base = load_model(config.model, self.tokenizer, self.device)
        self.model = add_adapters(base, config.lora, config.model.gradient_checkpointing)
        self.engine = make_engine(config.rollout, self.model, self.tokenizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        self.schedule = get_scheduler(
            _SCHEDULES[config.optim.schedule],
            self.optimizer,
            num_warmup_steps=config.optim.warmup_steps,
            num_training_steps=config.steps,
        )
        self.tokens = 0

    def run(self, logger: RunLogger, summary: dict[str, Any]) -> None:
        """Evaluate, train, evaluate again; `summary` fills up on the way."""
        before = self._evaluate("before", summary, logger)
        draws = self._draws()
        for step in range(1, self.config.steps + 1):
            row, shown = self.step(step, next(draws))
            summary["steps"] = step
            logger.log(step, row)
            if step % self.config.report.sample_every == 0 or step == 1:
                logger.samples(step, shown[: self.config.report.samples])
        after = self._evaluate("after", summary, logger)
        if before and after:
            summary["paired"] = paired_difference(before.correct, after.correct)

    def step(self, step: int, problems: list[Problem]) -> tuple[dict[str, Any], list[dict]]:
        """One optimizer step; returns its metrics and its samples for people to read."""
        config, marks = self.config, dict(self.clock.seconds)
        started = time.perf_counter()
        with self.clock.phase("rollout"):
            samples = self._rollout(step, problems)
        num_tokens = sum(len(sample.completion) for sample in samples)
        self.tokens += num_tokens
        self.model.train()
        stats = StepStats()
        for group in micro_batches(samples, config.micro_batch_tokens):
            self._accumulate(step, group, num_tokens, stats)
        with self.clock.phase("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optim.grad_clip)
            if not torch.isfinite(norm):
                self._refuse(step, samples, f"gradient norm is {norm.item()}")
            rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
        shown = self._shown(stats)
        took = {name: self.clock.seconds[name] - marks.get(name, 0.0) for name in STEP_PHASES}
        row = {
            "loss": stats.loss,
            "divergence": stats.mean("divergence"),
            "student_entropy": stats.mean("student_entropy"),
            "teacher_entropy": stats.mean("teacher_entropy"),
            "clipped_mass": stats.mean("clipped_mass"),
            "accuracy": sum(entry["correct"] for entry in shown) / len(shown),
            "completion_length": num_tokens / len(samples),
            "truncated": sum(self._truncated(sample) for sample in samples) / len(samples),
            "grad_norm": norm.item(),
            "lr": rate,
            "tokens": self.tokens,
            "tokens_per_second": num_tokens / took["rollout"],
            "seconds": time.perf_counter() - started,
            **{f"seconds_{name}": seconds for name, seconds in took.items()},
            "divergence_by_position": stats.divergence_by_position(),
            "top_tokens": stats.top_tokens(self.tokenizer),
        }
        return {name: value for name, value in row.items() if value is not None}, shown

    def _draws(self) -> Iterator[list[Problem]]:
        """Problems of one step after another: shuffled passes over the training problems."""
        rng = random.Random(stable_seed(self.config.seed, "order"))
        queue: list[Problem] = []
        while True:
            while len(queue) < self.config.problems_per_step:
                queue += rng.sample(self.problems, len(self.problems))
            yield queue[: self.config.problems_per_step]
            queue = queue[self.config.problems_per_step :]

    def _rollout(self, step: int, problems: list[Problem]) -> list[Sample]:
        prompts = [self.prompts.student(problem) for problem in problems]
        completions = self.engine.generate(
            prompts,
            self.config.rollout.max_new_tokens,
            batch_size=self.config.rollout.batch_size,
            seed=stable_seed(self.config.seed, "rollout", step),
        )
        return [
            Sample(problem, prompt, self.prompts.teacher(problem), completion)
            for problem, prompt, completion in zip(problems, prompts, completions, strict=True)
        ]

    def _accumulate(
        self, step: int, group: list[Sample], num_tokens: int, stats: StepStats
    ) -> None:
        """Add one micro-batch's gradient."""
        pad_id = self.tokenizer.pad_token_id
        with self.clock.phase("teacher"):
            teacher = opsd.teacher_view(self.model, group, pad_id)
        with self.clock.phase("student"):
            loss, columns = opsd.student_loss(
                self.model, group, teacher, pad_id, self.config.loss, num_tokens
            )
            if not torch.isfinite(loss):
                self._refuse(step, group, f"loss is {loss.item()}")
            loss.backward()
        stats.add(group, loss, columns)

    def _evaluate(self, when: str, summary: dict[str, Any], logger: RunLogger) -> Evaluation | None:
        """Held-out accuracy and divergence; at first the teacher's and the majority's too."""
        settings = self.config.evaluation
        if not self.heldout:
            return None
        with self.clock.phase("evaluate"):
            sides = ["student", "teacher"] if settings.teacher and when == "before" else ["student"]
            prompts = {s: [getattr(self.prompts, s)(p) for p in self.heldout] for s in sides}
            made = {
                side: evaluate(self.engine, self.tokenizer, self.heldout, prompts[side], settings)
                for side in sides
            }
            summary[when] = made["student"].summary()
            summary[f"divergence_{when}"] = self._heldout_divergence(made["student"])
        if when == "before":
            answer, share = majority_answer(self.heldout)
            summary["majority"] = {"answer": answer, "accuracy": share}
            if "teacher" in made:
                summary["teacher"] = made["teacher"].summary()
        for name, key in (("student", when), ("teacher", "teacher"), ("majority", "majority")):
            if key in summary and (when == "before" or key == when):
                line = f"{when} training, held-out accuracy: {name} {summary[key]['accuracy']:.1%}"
                logger.console.print(line, markup=False, soft_wrap=True)
        return made["student"]

    @torch.no_grad()
    def _heldout_divergence(self, evaluation: Evaluation) -> float:
        """Mean over the tokens of the student's own greedy completions."""
        samples = [
            Sample(
                problem, self.prompts.student(problem), self.prompts.teacher(problem), completion
            )
            for problem, completion in zip(self.heldout, evaluation.completions, strict=True)
        ]
        pad_id, stats = self.tokenizer.pad_token_id, StepStats()
        self.model.eval()
        for group in micro_batches(samples, self.config.micro_batch_tokens):
            teacher = opsd.teacher_view(self.model, group, pad_id)
            stats.add(
                group,
                *opsd.student_loss(self.model, group, teacher, pad_id, self.config.loss, 1),
            )
        return stats.mean("divergence")

    def _shown(self, stats: StepStats) -> list[dict[str, Any]]:
        """Rows of the sample table."""
        rows = []
        for sample, divergence in stats.by_sample():
            text = self.tokenizer.decode(sample.completion, skip_special_tokens=True)
            rows.append(
                {
                    "problem": sample.problem.id,
                    "question": sample.problem.question,
                    "answer": sample.problem.answer,
                    "completion": text,
                    "extracted": extract_answer(text, sample.problem.answer),
                    "correct": is_correct(sample.problem, text),
                    "divergence": divergence,
                }
            )
        return rows

    def _truncated(self, sample: Sample) -> bool:
        return sample.completion[-1] != self.tokenizer.eos_token_id

    def _refuse(self, step: int, samples: list[Sample], reason: str) -> None:
        """Stop on a value that would spoil the weights, and keep what led to it."""
        path = self.run_dir / f"nonfinite_step_{step}.pt"
        torch.save(
            [
                {
                    "problem": sample.problem.id,
                    "student_prompt": sample.student_prompt,
                    "teacher_prompt": sample.teacher_prompt,
                    "completion": sample.completion,
                }
                for sample in samples
            ],
            path,
        )
        raise UserError(f"step {step}: {reason}; its batch is in {path}")


def unused_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that holds no run: none is overwritten."""
    folder, count = wanted, 1
    while (folder / "config.yaml").exists():
        count += 1
        folder = wanted.with_name(f"{wanted.name}-{count}")
    return folder


STEP_PHASES = ("rollout", "teacher", "student", "optimizer")


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start


def stable_seed(*parts: object) -> int:
    """The same seed for the same parts on every machine and in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def peak_memory_mib(device: torch.device) -> float:
    """Peak of CUDA's allocator, or of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)
