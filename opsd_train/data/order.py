"""The order of problems: shuffled passes, or a curriculum by the student's success rate."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from opsd_train.config.schema import Config, CurriculumConfig
from opsd_train.data.problems import Problem
from opsd_train.data.seeds import stable_seed

FLOOR = 0.02
"""Smallest weight in a curriculum, so that problems far from the target are still drawn."""


class ProblemOrder(ABC):
    """Draws `size` problems per step.

    Draws depend only on the seed and on the results observed so far, so all ranks draw the same.
    """

    def __init__(self, problems: Sequence[Problem], size: int, seed: int) -> None:
        self.problems, self.size, self.seed = list(problems), size, seed

    @abstractmethod
    def draw(self, step: int) -> list[Problem]:
        """The `size` problems of a step; call it for the steps in order."""

    @abstractmethod
    def observe(self, results: Sequence[tuple[str, bool]]) -> None:
        """Take the results of a step: (problem id, correct) of all ranks' samples, in one order."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""


class Shuffled(ProblemOrder):
    """Passes over all problems, each newly shuffled; a step may span two passes."""

    def __init__(self, problems: Sequence[Problem], size: int, seed: int) -> None:
        super().__init__(problems, size, seed)
        self.position = 0  # problems drawn so far
        self._pass = -1
        self._order: list[Problem] = []

    def draw(self, step: int) -> list[Problem]:
        """The next `size` problems of the passes."""
        positions = range(self.position, self.position + self.size)
        self.position = positions.stop
        return [self._at(position) for position in positions]

    def observe(self, results: Sequence[tuple[str, bool]]) -> None:
        """Does nothing: results do not change the order."""

    def state_dict(self) -> dict[str, Any]:
        """The number of problems drawn so far."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after as many draws as the state has."""
        self.position = state["position"]

    def _at(self, position: int) -> Problem:
        number, index = divmod(position, len(self.problems))
        if number != self._pass:
            rng = random.Random(stable_seed(self.seed, "order", number))
            self._pass, self._order = number, rng.sample(self.problems, len(self.problems))
        return self._order[index]


class Curriculum(ProblemOrder):
    """Draws problems near a target success rate, without replacement within a step.

    A problem's weight is FLOOR + (1 - FLOOR) * exp(-d^2 / 2), d = (rate - target) / width. Its rate
    is a moving average of its results, initialised with the overall rate, the moving average of all
    results. A problem never tried counts with the overall rate; before any result, with the target.
    """

    def __init__(
        self, problems: Sequence[Problem], size: int, seed: int, config: CurriculumConfig
    ) -> None:
        super().__init__(problems, size, seed)
        self.config = config
        self.rates: dict[str, float] = {}
        self.overall: float | None = None

    def draw(self, step: int) -> list[Problem]:
        """`size` problems drawn by weight, without replacement unless there are fewer problems."""
        rng = random.Random(stable_seed(self.seed, "curriculum", step))
        drawn: list[Problem] = []
        while len(drawn) < self.size:  # repeats only if a step has more problems than there are
            # The largest keys log(u) / w, with u uniform and independent, are a weighted draw
            # without replacement (Efraimidis and Spirakis 2006).
            keys = [math.log(1 - rng.random()) / weight for weight in self.weights()]
            order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
            drawn += [self.problems[index] for index in order[: self.size - len(drawn)]]
        return drawn

    def weights(self) -> list[float]:
        """Weight of each problem: its probability of being drawn first, up to a common factor."""
        unseen = self.config.target if self.overall is None else self.overall
        return [self._weight(self.rates.get(problem.id, unseen)) for problem in self.problems]

    def observe(self, results: Sequence[tuple[str, bool]]) -> None:
        """Update the overall rate, and the rates of the problems that have results."""
        by_problem: dict[str, list[bool]] = {}
        for name, correct in results:
            by_problem.setdefault(name, []).append(correct)
        if results:
            self.overall = self._updated(self.overall, [correct for _, correct in results])
        for name, answers in by_problem.items():
            self.rates[name] = self._updated(self.rates.get(name, self.overall), answers)

    def state_dict(self) -> dict[str, Any]:
        """The rate of each problem that has results, and the overall rate."""
        return {"rates": dict(self.rates), "overall": self.overall}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rates."""
        self.rates, self.overall = dict(state["rates"]), state["overall"]

    def _weight(self, rate: float) -> float:
        distance = (rate - self.config.target) / self.config.width
        return FLOOR + (1 - FLOOR) * math.exp(-(distance**2) / 2)

    def _updated(self, rate: float | None, answers: Sequence[bool]) -> float:
        """memory * rate + (1 - memory) * the mean of `answers`, however many there are."""
        mean = sum(answers) / len(answers)
        return mean if rate is None else self.config.memory * rate + (1 - self.config.memory) * mean


def make_order(config: Config, problems: Sequence[Problem]) -> ProblemOrder:
    """The order that the recipe asks for: Curriculum if it has that section, else Shuffled."""
    if config.curriculum is None:
        return Shuffled(problems, config.problems_per_step, config.seed)
    return Curriculum(problems, config.problems_per_step, config.seed, config.curriculum)
