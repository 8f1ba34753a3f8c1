"""The samples of each step, in order; with `rollout.ahead` they are generated one step early.

Step t takes the completions that the servers generated while step t - 1 trained, hands the adapter
over as it is now, has the servers begin those of step t + 1, and trains. So the samples of step 1
are of the present weights, and later ones are of the weights one step earlier. What all ranks do
together stays on the main thread: another one only waits for HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.order import ProblemOrder
from opsd_train.distributed.context import DistributedContext
from opsd_train.rollout import Completion
from opsd_train.rollout.trajectories import RolloutRequest, Trajectories
from opsd_train.rollout.vllm_server_engine import VllmServerEngine


@dataclass(frozen=True)
class Rollout:
    """The samples of one step."""

    count: int  # of all ranks
    own: list[Sample]  # this rank's: sample i of the step is of rank i % size
    steps_old: int  # steps from the weights that wrote them to the present ones
    seconds: float  # that their generation took


@dataclass
class _Next:
    """The next step: its requests of all ranks, and this rank's completions with their seconds."""

    requests: list[RolloutRequest]
    made: Future[tuple[list[Completion], float]] | None  # None: failed before a checkpoint


class Rollouts:
    """Draws each step's problems and makes this rank's samples. Every rank makes every call."""

    def __init__(
        self,
        config: Config,
        order: ProblemOrder,
        trajectories: Trajectories,
        context: DistributedContext,
    ) -> None:
        self._order, self._trajectories, self._context = order, trajectories, context
        self._steps = config.steps
        self._servers: VllmServerEngine | None = None
        if config.rollout.ahead:
            assert isinstance(trajectories.engine, VllmServerEngine)  # the recipe was checked
            self._servers = trajectories.engine
        self._next: _Next | None = None

    def take(self, step: int) -> Rollout:
        """The samples of a step, as soon as they are there; then the next ones are begun.

        Raises UserError if their generation failed, in the background too.
        """
        following, self._next = self._next, None
        requests = following.requests if following else self._draw(step)
        own = self._own(requests)
        if following is None or following.made is None:
            start = time.perf_counter()
            samples = self._trajectories.make(step, own)
            rollout = Rollout(len(requests), samples, 0, time.perf_counter() - start)
        else:
            completions, seconds = following.made.result()
            samples = self._trajectories.samples(own, completions)
            rollout = Rollout(len(requests), samples, 1, seconds)
        if self._servers is not None and step < self._steps:
            if rollout.steps_old:
                self._trajectories.sync()
            self._next = self._begin(self._servers, step + 1)
        return rollout

    def state(self) -> dict[str, Any]:
        """This rank's part of the next step's samples, for a checkpoint: waits for them.

        Empty if none were begun. Without completions if their generation failed, so that the steps
        so far can still be saved: a resumed run generates them with its own weights.
        """
        following = self._next
        if following is None:
            return {}
        names = [request.problem.id for request in following.requests if request.number == 0]
        state: dict[str, Any] = {"problems": names}
        if following.made is not None and following.made.exception() is None:
            completions, state["seconds"] = following.made.result()
            state["completions"] = [_packed(completion) for completion in completions]
        return state

    def load_state(self, step: int, states: Sequence[dict[str, Any]]) -> None:
        """Go on with what `state` returned on each rank, the samples of step number `step`; there
        may have been another number of ranks."""
        if not states or not states[0]:
            return
        by_id = {problem.id: problem for problem in self._order.problems}
        problems = [by_id[name] for name in states[0]["problems"]]
        self._next = _Next(self._trajectories.requests(problems, step), None)
        if all("completions" in state for state in states):
            ranks = len(states)
            made = [
                _unpacked(states[index % ranks]["completions"][index // ranks])
                for index in range(len(self._next.requests))
            ]
            self._next.made = Future()
            self._next.made.set_result((self._own(made), max(s["seconds"] for s in states)))

    def close(self) -> None:
        """End what is being generated."""
        if self._servers is not None:
            self._servers.close()

    def _begin(self, servers: VllmServerEngine, step: int) -> _Next:
        requests = self._draw(step)
        prompted = self._trajectories.prompted(step, self._own(requests))
        return _Next(requests, servers.start(prompted, self._trajectories.sampling))

    def _draw(self, step: int) -> list[RolloutRequest]:
        return self._trajectories.requests(self._order.draw(step), step)

    def _own(self, items: list[Any]) -> list[Any]:
        return items[self._context.rank :: self._context.size]


def _packed(completion: Completion) -> dict[str, Any]:
    """As torch.load reads it with weights_only=True; fp64 keeps the log-probabilities exact."""
    return {
        "tokens": torch.tensor(completion.tokens, dtype=torch.int64),
        "logprobs": torch.tensor(completion.logprobs, dtype=torch.float64),
        "finished": completion.finished,
    }


def _unpacked(state: dict[str, Any]) -> Completion:
    tokens, logprobs = state["tokens"].tolist(), state["logprobs"].tolist()
    return Completion(tokens, logprobs, finished=state["finished"])
