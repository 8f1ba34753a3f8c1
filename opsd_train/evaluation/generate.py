"""Generates the completions that an evaluation's folder lacks, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from opsd_train.data.batches import token_batches
from opsd_train.data.seeds import stable_seed
from opsd_train.distributed.context import DistributedContext
from opsd_train.evaluation.eval_prompts import EvalPrompts
from opsd_train.evaluation.sets import EvalProblem
from opsd_train.evaluation.settings import EvalConfig, SamplingConfig
from opsd_train.evaluation.source import Source, open_engine
from opsd_train.evaluation.store import GenerationFile, Key, Rows, Store
from opsd_train.model.policy import load_model_config
from opsd_train.reporting.out_of_memory import explained
from opsd_train.rollout import Completion, Request, Sampling
from opsd_train.rollout.context_checks import LongestSequence, check_batch_tokens, check_fits

_VLLM_BATCH = 256  # completions between two writes; vLLM makes its own batches of them


@dataclass(frozen=True)
class EvalSample:
    """One completion that is to be generated."""

    problem: EvalProblem
    number: int  # which of the problem's samples
    prompt: list[int]
    seed: int

    @property
    def key(self) -> Key:
        """The completion's name in the store."""
        return self.problem.set, self.problem.problem, self.number


def generate(
    config: EvalConfig,
    source: Source,
    store: Store,
    prompts: EvalPrompts,
    context: DistributedContext,
    progress: Callable[[int, int], None],
) -> None:
    """Generate the completions that the folder lacks.

    `progress` is called with the completions done and the total, of this process. Each process
    generates its share. A completion depends neither on the number of processes nor on what the
    folder had, except for rounding where batches differ. Raises UserError if the longest prompt
    and its completion exceed the model's context or sampling.batch_tokens, and where a GPU has too
    little memory.
    """
    samples = _samples(config, store.problems(), prompts)
    longest = max(len(sample.prompt) for sample in samples)
    _check_limits(config.sampling, source, longest)
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
        explained(partial(_needs_less, config.sampling)),
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
            completions = engine.generate(requests, Sampling.of(config.sampling))
            file.append(_rows(batch, completions, prompts.tokenizer))
            done += len(batch)
            progress(done, len(mine))


def _needs_less(sampling: SamplingConfig) -> str:
    """What needs less of a GPU's memory."""
    if sampling.engine == "vllm":
        return f"lower sampling.vllm_memory ({sampling.vllm_memory:g}) or take a smaller model"
    return f"lower sampling.batch_tokens ({sampling.batch_tokens}) or take a smaller model"


def patient_barrier(context: DistributedContext) -> Callable[[], None]:
    """A barrier with a timeout of 30 days: some ranks may generate for hours longer than others.

    Every rank calls this at about the same time, and later the function that it returns.
    """
    if context.size == 1:
        return _nothing_to_wait_for
    group = dist.new_group(timeout=timedelta(days=30), backend="gloo")
    context.barrier()
    return partial(dist.barrier, group)


def _nothing_to_wait_for() -> None:
    """The barrier of a single process."""


def _samples(
    config: EvalConfig, problems: Sequence[EvalProblem], prompts: EvalPrompts
) -> list[EvalSample]:
    """All completions, in ascending order of their prompts' length."""
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
    """The completions generated between two writes: one batch of the engine, with vLLM several."""
    if sampling.engine == "vllm":
        for start in range(0, len(samples), _VLLM_BATCH):
            yield list(samples[start : start + _VLLM_BATCH])
        return
    lengths = (len(sample.prompt) + sampling.max_new_tokens for sample in samples)
    yield from token_batches(zip(samples, lengths, strict=True), sampling.batch_tokens)


def _check_limits(sampling: SamplingConfig, source: Source, longest: int) -> None:
    """Raises UserError unless the longest prompt and its completion fit model and batches."""
    new = sampling.max_new_tokens
    sequence = LongestSequence("longest prompt has", longest, "sampling.max_new_tokens", new)
    check_fits(sequence, load_model_config(source.model))
    if sampling.engine == "transformers":
        check_batch_tokens("sampling.batch_tokens", sampling.batch_tokens, longest, new)


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
