"""The completions of an evaluation: what is missing, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from opsd_train.data.seeds import stable_seed
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.eval_prompts import EvalPrompts, check_context
from opsd_train.evaluation.sets import EvalProblem
from opsd_train.evaluation.settings import EvalConfig, SamplingConfig
from opsd_train.evaluation.source import Source, open_engine
from opsd_train.evaluation.store import GenerationFile, Key, Rows, Store
from opsd_train.model.policy import load_model_config
from opsd_train.rollout import Completion, Request, Sampling

_VLLM_BATCH = 256  # completions between two writes; vLLM itself fills its batches from them


@dataclass(frozen=True)
class EvalSample:
    """One completion to make."""

    problem: EvalProblem
    number: int  # which of the problem's samples
    prompt: list[int]
    seed: int

    @property
    def key(self) -> Key:
        return self.problem.set, self.problem.problem, self.number


def generate(
    config: EvalConfig,
    source: Source,
    store: Store,
    prompts: EvalPrompts,
    context: DistributedContext,
    progress: Callable[[int, int], None],
) -> None:
    """Make what the folder does not have yet; `progress` is told completions made and wanted.

    Of several processes each makes its part. What is made depends neither on their number nor on
    what was there before, but for rounding where that makes other batches.
    """
    samples = _samples(config, store.problems(), prompts)
    longest = max(len(sample.prompt) for sample in samples)
    check_context(config, load_model_config(source.model), longest)
    there = context.broadcast(set(store.generations()))
    mine = samples[context.rank :: context.size]
    batches = [
        [sample for sample in batch if sample.key not in there]
        for batch in _batches(mine, config.sampling)
    ]
    done = len(mine) - sum(map(len, batches))
    progress(done, len(mine))
    if done == len(mine):
        return
    with (
        open_engine(
            config,
            source,
            prompts.tokenizer,
            context,
            scratch=store.folder / "scratch" / f"rank_{context.rank}",
            longest=longest + config.sampling.max_new_tokens,
        ) as engine,
        GenerationFile(store.folder, context.rank, context.size) as file,
    ):
        for batch in filter(None, batches):
            requests = [Request(sample.prompt, sample.seed) for sample in batch]
            completions = engine.generate(requests, _sampling(config.sampling))
            file.append(_rows(batch, completions, prompts.tokenizer))
            done += len(batch)
            progress(done, len(mine))


def patient_barrier(context: DistributedContext) -> Callable[[], None]:
    """A barrier that waits for days: some ranks may have hours more to generate than others.

    Every rank calls it, at about the same time, and later what it returns.
    """
    if context.size == 1:
        return lambda: None
    group = dist.new_group(timeout=timedelta(days=30), backend="gloo")
    context.barrier()
    return lambda: dist.barrier(group)


def _samples(
    config: EvalConfig, problems: Sequence[EvalProblem], prompts: EvalPrompts
) -> list[EvalSample]:
    """All completions, those with prompts of similar length side by side."""
    tokens = {problem: prompts.prompt(problem) for problem in problems}
    ordered = sorted(problems, key=lambda problem: (len(tokens[problem]), tokens[problem]))
    return [
        EvalSample(problem, number, tokens[problem], _seed(config, problem, number))
        for problem in ordered
        for number in range(config.sampling.samples)
    ]


def _seed(config: EvalConfig, problem: EvalProblem, number: int) -> int:
    return stable_seed(config.seed, problem.set, problem.problem, number)


def _batches(samples: Sequence[EvalSample], sampling: SamplingConfig) -> Iterator[list[EvalSample]]:
    """What is generated before it is written: one batch of the transformers engine, or more."""
    if sampling.engine == "vllm":
        for start in range(0, len(samples), _VLLM_BATCH):
            yield list(samples[start : start + _VLLM_BATCH])
        return
    batch: list[EvalSample] = []
    for sample in samples:  # from short to long: the last one is the widest
        tokens = len(sample.prompt) + sampling.max_new_tokens
        if batch and (len(batch) + 1) * tokens > sampling.batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def _sampling(config: SamplingConfig) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k)


def _rows(batch: Sequence[EvalSample], completions: Sequence[Completion], tokenizer: Any) -> Rows:
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    return [
        {
            "set": sample.problem.set,
            "problem": sample.problem.problem,
            "sample": sample.number,
            "prompt_tokens": len(sample.prompt),
            "tokens": len(completion.tokens),
            "finished": completion.finished,
            "text": text,
        }
        for sample, completion, text in zip(batch, completions, texts, strict=True)
    ]
