"""A trainer whose samples come from doubles of vLLM's servers, and what its steps gave."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from opsd_train.data.order import make_order
from opsd_train.evaluation.grading import Answer
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.rollout.ahead import Rollout
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.trainer import Trainer
from tests.helpers.pair import alone
from tests.helpers.tiny import config
from tests.helpers.verdicts import made_up
from tests.helpers.vllm_double import VllmDouble

STEPS = 4
BASE = (f"steps={STEPS}", "micro_batch_tokens=1000", "evaluation.problems=0", "optim.lr=0.03")


def served_by(*doubles: VllmDouble, ahead: int = 1) -> tuple[str, ...]:
    urls = ",".join(double_.url for double_ in doubles)
    engine = ("rollout.engine=vllm-server", f"rollout.servers=[{urls}]")
    return (*engine, f"rollout.ahead={ahead}")


def even(answer: Answer) -> bool:
    """Some answers are right."""
    return sum(answer.text.encode()) % 2 == 0


def make_trainer(model: Path, folder: Path, *overrides: str) -> Trainer:
    made = config(model, folder, *BASE, *overrides)
    with made_up(even):
        return Trainer(made, alone(), RunFolder(folder, alone()), PhaseTimer(), "full")


@dataclass
class Course:
    """What the steps of a trainer began with and gave."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # before each step


def trained(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.policy.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def put(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    trainer.policy.model.load_state_dict(weights, strict=False)


def follow(trainer: Trainer, steps: int = STEPS) -> Course:
    course, take = Course(), trainer.rollouts.take

    def noting(step: int) -> Rollout:
        course.rollouts.append(take(step))
        return course.rollouts[-1]

    trainer.rollouts.take = noting
    for step in range(1, steps + 1):
        course.weights.append(trained(trainer))
        course.rows.append(trainer.step(step)[0])
    return course


def by_transformers(trainer: Trainer, weights: dict[str, Tensor], step: int) -> list[Any]:
    """The completions of a step's problems with these weights; for an order without results."""
    put(trainer, weights)
    order = make_order(trainer.config, trainer.problems)
    drawn = [order.draw(number) for number in range(1, step + 1)][-1]
    requests = trainer.trajectories.prompted(step, trainer.trajectories.requests(drawn, step))
    engine = TransformersEngine(trainer.policy, trainer.tokenizer, trainer.config.rollout)
    return engine.generate(requests, trainer.trajectories.sampling)
