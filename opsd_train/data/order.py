"""Which problems a step trains on."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from opsd_train.config.schema import Config, CurriculumConfig
from opsd_train.data.problems import Problem
from opsd_train.data.seeds import stable_seed

FLOOR = 0.02  # of the largest weight possible: a problem far from the target still comes up


class ProblemOrder(ABC):
    """Draws depend on the seed and on the results observed so far, so all ranks draw the same."""

    def __init__(self, problems: Sequence[Problem], size: int, seed: int) -> None:
        self.problems, self.size, self.seed = list(problems), size, seed

    @abstractmethod
    def draw(self, step: int) -> list[Problem]:
        """The `size` problems of a step; steps are drawn in order."""

    @abstractmethod
    def observe(self, results: Sequence[tuple[str, bool]]) -> None:
        """Problem ids with right or wrong: the results of a step, of all ranks, in one order."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`."""


class Shuffled(ProblemOrder):
    """Passes over all problems, each in an order of its own; a step may span two passes."""

    def __init__(self, problems: Sequence[Problem], size: int, seed: int) -> None:
        super().__init__(problems, size, seed)
        self.position = 0  # problems drawn so far
        self._pass, self._order = -1, []

    def draw(self, step: int) -> list[Problem]:
        positions = range(self.position, self.position + self.size)
        self.position = positions.stop
        return [self._at(position) for position in positions]

    def observe(self, results: Sequence[tuple[str, bool]]) -> None:
        """Results do not change the order."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def _at(self, position: int) -> Problem:
        number, index = divmod(position, len(self.problems))
        if number != self._pass:
            rng = random.Random(stable_seed(self.seed, "order", number))
            self._pass, self._order = number, rng.sample(self.problems, len(self.problems))
        return self._order[index]


class Curriculum(ProblemOrder):
    """Draws problems near a success rate of the student, without replacement within a step.

    A problem's rate is a moving average over its results. It starts from the overall rate, a moving
    average over all results, which also stands in for the rate of a problem that was never tried.
    """

    def __init__(
        self, problems: Sequence[Problem], size: int, seed: int, config: CurriculumConfig
    ) -> None:
        super().__init__(problems, size, seed)
        self.config = config
        self.rates: dict[str, float] = {}
        self.overall: float | None = None

    def draw(self, step: int) -> list[Problem]:
        rng = random.Random(stable_seed(self.seed, "curriculum", step))
        drawn: list[Problem] = []
        while len(drawn) < self.size:  # more than once around only if a step exceeds the problems
            # The largest log(u)/w of independent u are a weighted draw without replacement
            # (Efraimidis and Spirakis 2006).
            keys = [math.log(1 - rng.random()) / weight for weight in self.weights()]
            order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
            drawn += [self.problems[index] for index in order[: self.size - len(drawn)]]
        return drawn

    def weights(self) -> list[float]:
        """How likely each problem is to be drawn first, up to a common factor."""
        unseen = self.config.target if self.overall is None else self.overall
        return [self._weight(self.rates.get(problem.id, unseen)) for problem in self.problems]

    def observe(self, results: Sequence[tuple[str, bool]]) -> None:
        by_problem: dict[str, list[bool]] = {}
        for name, correct in results:
            by_problem.setdefault(name, []).append(correct)
        if results:
            self.overall = self._updated(self.overall, [correct for _, correct in results])
        for name, answers in by_problem.items():
            self.rates[name] = self._updated(self.rates.get(name, self.overall), answers)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates), "overall": self.overall}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates, self.overall = dict(state["rates"]), state["overall"]

    def _weight(self, rate: float) -> float:
        distance = (rate - self.config.target) / self.config.width
        return FLOOR + (1 - FLOOR) * math.exp(-(distance**2) / 2)

    def _updated(self, rate: float | None, answers: Sequence[bool]) -> float:
        """`memory` is kept of the old rate, whatever the number of samples in a step."""
        new = sum(answers) / len(answers)
        return new if rate is None else self.config.memory * rate + (1 - self.config.memory) * new


def make_order(config: Config, problems: Sequence[Problem]) -> ProblemOrder:
    """The sampler a recipe asks for."""
    if config.curriculum is None:
        return Shuffled(problems, config.problems_per_step, config.seed)
    return Curriculum(problems, config.problems_per_step, config.seed, config.curriculum)
