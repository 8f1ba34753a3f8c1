"""The completions of an evaluation: what is missing, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from opsd_train.data.seeds import stable_seed
from opsd_train.distributed.context import World
from opsd_train.evaluation.asking import Asking, check_context
from opsd_train.evaluation.sets import EvalProblem
from opsd_train.evaluation.settings import EvalConfig, SamplingConfig
from opsd_train.evaluation.source import Source, open_engine
from opsd_train.evaluation.store import GenerationFile, Key, Rows, Store
from opsd_train.model.policy import load_model_config
from opsd_train.rollout import Completion, Request, Sampling

_VLLM_BATCH = 256  # completions between two writes; vLLM itself fills its batches from them


@dataclass(frozen=True)
class Job:
    """One completion to make."""

    problem: EvalProblem
    sample: int
    prompt: list[int]
    seed: int

    @property
    def key(self) -> Key:
        return self.problem.set, self.problem.problem, self.sample


def generate(
    config: EvalConfig,
    source: Source,
    store: Store,
    asking: Asking,
    world: World,
    progress: Callable[[int, int], None],
) -> None:
    """Make what the folder does not have yet; `progress` is told completions made and wanted.

    Of several processes each makes its part. What is made depends neither on their number nor on
    what was there before, but for rounding where that makes other batches.
    """
    jobs = _jobs(config, store.problems(), asking)
    longest = max(len(job.prompt) for job in jobs)
    check_context(config, load_model_config(source.model), longest)
    there = world.broadcast(set(store.generations()))
    mine = jobs[world.rank :: world.size]
    batches = [
        [job for job in batch if job.key not in there] for batch in _batches(mine, config.sampling)
    ]
    done = len(mine) - sum(map(len, batches))
    progress(done, len(mine))
    if done == len(mine):
        return
    with (
        open_engine(
            config,
            source,
            asking.tokenizer,
            world,
            scratch=store.folder / "scratch" / f"rank_{world.rank}",
            longest=longest + config.sampling.max_new_tokens,
        ) as engine,
        GenerationFile(store.folder, world.rank, world.size) as file,
    ):
        for batch in filter(None, batches):
            requests = [Request(job.prompt, job.seed) for job in batch]
            completions = engine.generate(requests, _sampling(config.sampling))
            file.append(_rows(batch, completions, asking.tokenizer))
            done += len(batch)
            progress(done, len(mine))


def patient_barrier(world: World) -> Callable[[], None]:
    """A barrier that waits for days: some ranks may have hours more to generate than others.

    Every rank calls it, at about the same time, and later what it returns.
    """
    if world.size == 1:
        return lambda: None
    group = dist.new_group(timeout=timedelta(days=30), backend="gloo")
    world.barrier()
    return lambda: dist.barrier(group)


def _jobs(config: EvalConfig, problems: Sequence[EvalProblem], asking: Asking) -> list[Job]:
    """All completions, those with prompts of similar length side by side."""
    prompts = {problem: asking.prompt(problem) for problem in problems}
    ordered = sorted(problems, key=lambda problem: (len(prompts[problem]), prompts[problem]))
    return [
        Job(problem, sample, prompts[problem], _seed(config, problem, sample))
        for problem in ordered
        for sample in range(config.sampling.samples)
    ]


def _seed(config: EvalConfig, problem: EvalProblem, sample: int) -> int:
    return stable_seed(config.seed, problem.set, problem.problem, sample)


def _batches(jobs: Sequence[Job], sampling: SamplingConfig) -> Iterator[list[Job]]:
    """What is generated before it is written: one batch of the transformers engine, or more."""
    if sampling.engine == "vllm":
        for start in range(0, len(jobs), _VLLM_BATCH):
            yield list(jobs[start : start + _VLLM_BATCH])
        return
    batch: list[Job] = []
    for job in jobs:  # from short to long: the last one is the widest
        tokens = len(job.prompt) + sampling.max_new_tokens
        if batch and (len(batch) + 1) * tokens > sampling.batch_tokens:
            yield batch
            batch = []
        batch.append(job)
    yield batch


def _sampling(config: SamplingConfig) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)


def _rows(batch: Sequence[Job], completions: Sequence[Completion], tokenizer: Any) -> Rows:
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    return [
        {
            "set": job.problem.set,
            "problem": job.problem.problem,
            "sample": job.sample,
            "prompt_tokens": len(job.prompt),
            "tokens": len(completion.tokens),
            "finished": completion.finished,
            "text": text,
        }
        for job, completion, text in zip(batch, completions, texts, strict=True)
    ]
