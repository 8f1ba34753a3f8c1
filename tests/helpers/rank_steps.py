"""One of N ranks, run by test_ranks.py in a fresh process: steps of a run, and what the CPU can do.

Before and after every step each rank measures the rates of a `Device` at the sizes that the step
has, while the other ranks do the same: cores and memory are shared, with other processes too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from opsd_train.config.load import config_from
from opsd_train.config.schema import Config
from opsd_train.distributed.context import DistributedContext, init_distributed
from opsd_train.reporting.run_folder import RunFolder
from opsd_train.reporting.timers import PhaseTimer
from opsd_train.trainer import Trainer
from tests.helpers.phase_peaks import PeakTimer, settled
from tests.helpers.verdicts import made_up

REPEATS = 10
FIRST = 2  # steps that are not measured: memory is mapped in them
TOKENS, ROWS = 1000, 32  # about those of a micro-batch; samples that all ranks generate


class Probes:
    """Rates of this rank in units per second, at a layer's sizes."""

    def __init__(self, context: DistributedContext, text: Any) -> None:
        self.context = context
        depth, inner = text.hidden_size, text.intermediate_size
        self.x, self.w = torch.randn(TOKENS, depth), torch.randn(inner, depth)
        self.few = torch.randn(ROWS // context.size, depth)
        self.wide = torch.randn(TOKENS, inner), torch.randn(TOKENS, inner)
        heads, width = text.num_attention_heads, text.head_dim
        self.query = torch.randn(TOKENS // 256, heads, 256, width)
        weights = 2 * depth * width * (heads + text.num_key_value_heads) + 3 * depth * inner
        self.layer = torch.randn(-(-weights // context.size) * context.size)
        self.model = torch.randn(text.num_hidden_layers * weights)  # more than a cache holds
        self.part = torch.randn(len(self.layer) // context.size)

    def measure(self) -> dict[str, float]:
        """Rates by their name in `Device`.

        `thin`: bytes that a product of few rows reads. `scatter`: bytes that are reduced. `link`
        includes what FSDP's copies take longer than `bandwidth` says: weights are in no cache.
        """
        found = {
            "products": 4 * self.x.numel() * len(self.w) / self._time(self._product),
            "attention": 2 * self.query.numel() * 256 / self._time(self._attention),
            "thin": 4 * len(self.model) / self._time(self._thin_product),
            "bandwidth": 40 * self.wide[0].numel() / self._time(self._memory),
        }
        if self.context.size > 1:
            size, layer = self.context.size, 4 * len(self.layer)
            sent = layer * (size - 1) / size
            copies = 2 * (layer + layer / size) / found["bandwidth"]
            found["link"] = sent / (self._time(self._gather) - copies)
            found["scatter"] = sent / self._time(self._scatter)
        return found

    def _product(self) -> None:
        torch.mm(torch.nn.functional.linear(self.x, self.w), self.w)

    def _thin_product(self) -> None:
        for weight in self.model.split(self.w.numel()):
            torch.nn.functional.linear(self.few, weight.view(-1, self.few.shape[1]))

    def _attention(self) -> None:
        torch.nn.functional.scaled_dot_product_attention(
            self.query, self.query, self.query, is_causal=True
        )

    def _memory(self) -> None:
        one, two = self.wide
        torch.nn.functional.silu(one)
        torch.mul(one, two)
        torch.add(one, two)
        one.pow(2)

    def _gather(self) -> None:
        """As FSDP does: this rank's part into a buffer, and from there to tensors of their own."""
        buffer = torch.empty_like(self.layer)
        part = buffer.chunk(self.context.size)[self.context.rank].copy_(self.part)
        dist.all_gather_into_tensor(buffer, part)
        self.weights = [weight.clone() for weight in buffer.chunk(8)]

    def _scatter(self) -> None:
        dist.reduce_scatter_tensor(torch.empty_like(self.part), self.layer)

    def _time(self, call: Callable[[], None]) -> float:
        """Mean seconds of a call, every rank at once."""
        self.context.barrier()
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        return (time.perf_counter() - start) / REPEATS


def seconds(config: Config, context: DistributedContext, steps: int) -> dict[str, Any]:
    """Seconds by phase, and rates, of each step after the first ones."""
    timer = PhaseTimer()
    trainer = _trainer(config, context, timer)
    probes = Probes(context, trainer.policy.core.config.get_text_config())
    for step in range(1, FIRST + 1):
        trainer.step(step)
    rates, found = [probes.measure()], []
    for step in range(FIRST + 1, FIRST + steps + 1):
        started = dict(timer.seconds)
        trainer.step(step)
        found.append({n: s - started.get(n, 0.0) for n, s in timer.seconds.items()})
        rates.append(probes.measure())
    trainer.close()
    between = [
        {name: statistics.harmonic_mean([one[name], two[name]]) for name in one}
        for one, two in pairwise(rates)
    ]
    return {"seconds": found, "rates": between}


def peaks(config: Config, context: DistributedContext, steps: int) -> dict[str, Any]:
    """Bytes by phase, above those of the process before it, of the last of steps after a first."""
    timer = PeakTimer()
    before = settled()
    trainer = _trainer(config, context, timer)
    for step in range(1, steps + 2):
        trainer.step(step)
    trainer.close()
    return {name: peak - before for name, peak in timer.peaks.items() if name != "load"}


def _trainer(config: Config, context: DistributedContext, timer: PhaseTimer) -> Trainer:
    folder = RunFolder(Path(config.output_dir), context)
    with timer.phase("load"), made_up():
        return Trainer(config, context, folder, timer, "full")


def main(what: str, recipe: str, overrides: str, out: str, steps: str) -> None:
    """`what`: "seconds" or "peaks"."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    context = init_distributed("cpu")
    torch.set_num_threads(1)  # as torchrun has it; two that share a core wait for each other
    config = config_from(json.loads(recipe), json.loads(overrides))
    found = {"seconds": seconds, "peaks": peaks}[what](config, context, int(steps))
    Path(out, f"{context.rank}.json").write_text(json.dumps(found))
    context.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
