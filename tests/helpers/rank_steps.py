"""One of N ranks, run by test_ranks.py in a fresh process: steps of a run, and what the CPU can do.

Before and after every step each rank measures the rates of a `Device` at the sizes that the step
has, while the other ranks do the same: cores and memory are shared, with other processes too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from opsd_train.trainer import Trainer
from tests.helpers.phase_peaks import PeakTimer, settled
from tests.helpers.verdicts import made_up

REPEATS = 3


class CpuTimer(PeakTimer):
    """Also adds up the CPU seconds of all threads, which other processes do not add to."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            start = time.process_time()
            yield
            self.spent[name] += time.process_time() - start


class Probes:
    """Rates of this rank in units per second, at a layer's sizes."""

    def __init__(self, context: DistributedContext, tokens: int, text: Any) -> None:
        self.context = context
        depth, inner = text.hidden_size, text.intermediate_size
        self.x, self.w = torch.randn(tokens, depth), torch.randn(inner, depth)
        self.wide = torch.randn(tokens, inner), torch.randn(tokens, inner)
        heads, width = text.num_attention_heads, text.head_dim
        self.query = torch.randn(tokens // 256, heads, 256, width)
        weights = 2 * depth * width * (heads + text.num_key_value_heads) + 3 * depth * inner
        self.layer = torch.randn(-(-weights // context.size) * context.size)
        self.part = torch.randn(len(self.layer) // context.size)

    def measure(self) -> dict[str, float]:
        """Rates by their name in `Device`; `scatter`: bytes that a reduce-scatter reduces."""
        found = {
            "products": 4 * self.x.numel() * len(self.w) / self._time(self._product),
            "attention": 2 * self.query.numel() * 256 / self._time(self._attention),
            "bandwidth": 40 * self.wide[0].numel() / self._time(self._memory),
        }
        if self.context.size > 1:
            sent = 4 * len(self.layer) * (self.context.size - 1) / self.context.size
            found["link"] = sent / self._time(self._gather)
            found["scatter"] = sent / self._time(self._scatter)
        return found

    def _product(self) -> None:
        torch.mm(torch.nn.functional.linear(self.x, self.w), self.w)

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
        dist.all_gather_into_tensor(torch.empty_like(self.layer), self.part)  # as FSDP does

    def _scatter(self) -> None:
        dist.reduce_scatter_tensor(torch.empty_like(self.part), self.layer)

    def _time(self, call: Callable[[], None]) -> float:
        """Mean CPU seconds of a call, every rank at once."""
        self.context.barrier()
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        return (time.process_time() - start) / REPEATS


def run(config: Config, context: DistributedContext, steps: int, tokens: int) -> dict[str, Any]:
    """Seconds and rates of each step after a first one, and the peaks of the last."""
    timer = CpuTimer()
    folder = RunFolder(Path(config.output_dir), context)
    before = settled()
    with timer.phase("load"), made_up():
        trainer = Trainer(config, context, folder, timer, "full")
    text = trainer.policy.core.config.get_text_config()
    probes = Probes(context, tokens, text)
    held = settled_growth(probes)
    trainer.step(1)
    rates, seconds = [probes.measure()], []
    for step in range(2, steps + 2):
        started = dict(timer.spent)
        trainer.step(step)
        seconds.append({n: s - started.get(n, 0.0) for n, s in timer.spent.items()})
        rates.append(probes.measure())
    trainer.close()
    between = [
        {name: statistics.harmonic_mean([one[name], two[name]]) for name in one}
        for one, two in pairwise(rates)
    ]
    peaks = {name: peak - before - held for name, peak in timer.peaks.items() if name != "load"}
    return {"seconds": seconds, "rates": between, "peaks": peaks}


def settled_growth(probes: Probes) -> int:
    """Bytes of the probes' tensors, which are no part of a run."""
    tensors = [probes.x, probes.w, *probes.wide, probes.query, probes.layer, probes.part]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(recipe: str, overrides: str, out: str, steps: str, tokens: str) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    context = init_distributed("cpu")
    torch.set_num_threads(1)  # as torchrun has it; two that share a core wait for each other
    config = config_from(json.loads(recipe), json.loads(overrides))
    found = run(config, context, int(steps), int(tokens))
    Path(out, f"{context.rank}.json").write_text(json.dumps(found))
    context.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
