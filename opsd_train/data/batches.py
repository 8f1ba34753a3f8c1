"""The samples of a step: dealt out to the ranks, and cut into batches by a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

from opsd_train.config.errors import UserError
from opsd_train.data.layout import PADDED, Layout
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """A completion under the student's prompt and, if the method has one, the teacher's."""

    problem: Problem
    student_prompt: list[int]
    teacher_prompt: list[int] | None
    completion: list[int]
    logprobs: list[float] | None = None  # the sampler's, in nats; None where not comparable
    finished: bool = True  # ended by a stop token
    correct: bool | None = None  # None where no answer was generated, or none is graded yet
    answer: str | None = None  # as the grader found it
    check_failed: str | None = None  # why the answer could not be graded: it counts as wrong
    # What the teacher sees of the rollout (see data/contexts.py); None: the problem's prompt.
    context: tuple[str, ...] | None = None
    weight: float = 1.0  # of its tokens in the loss; 0: left out
    divergence_weight: float = 1.0  # times `weight`, of its divergence from the teacher
    policy_weight: float = 1.0  # times `weight`, of its policy gradient
    advantage: float = 0.0  # of the policy gradient

    @property
    def longest(self) -> int:
        """Tokens of the longer prompt and the completion."""
        return max(len(self.student_prompt), len(self.teacher_prompt or ())) + len(self.completion)


def token_batches(items: Iterable[tuple[Item, int]], token_budget: int) -> Iterator[list[Item]]:
    """Cut items, each given with its length in tokens, into batches of at most `token_budget`.

    Items keep their order, and a batch takes as many as fit; a batch of N items counts N times
    its longest one. An item longer than the budget is a batch of its own: callers that cannot have
    one check first.
    """
    batch: list[Item] = []
    width = 0  # the longest of the batch
    for item, length in items:
        width = max(width, length)
        if batch and (len(batch) + 1) * width > token_budget:
            yield batch
            batch, width = [], length
        batch.append(item)
    if batch:
        yield batch


def micro_batches(
    samples: Iterable[Sample], token_budget: int, layout: Layout = PADDED
) -> Iterator[list[Sample]]:
    """Samples of similar length in batches of at most `token_budget` tokens, shortest first.

    Padding counts. Samples that share a prompt are together, in one batch where they fit. Raises
    UserError if a sample is longer than the budget.
    """
    batch: list[Sample] = []
    for run in _runs(samples, layout):
        for sample in run:
            if sample.longest > token_budget:
                raise UserError(
                    f"micro_batch_tokens={token_budget} is less than one sample: problem "
                    f"{sample.problem.id} has {sample.longest} tokens; raise it"
                )
        fits = _tokens(run, layout) <= token_budget
        for part in [run] if fits else [[sample] for sample in run]:
            if batch and _tokens([*batch, *part], layout) > token_budget:
                yield batch
                batch = []
            batch = [*batch, *part]
    if batch:
        yield batch


def balanced_micro_batches(
    samples: Sequence[Sample],
    active: Sequence[Sample],
    token_budget: int,
    context: DistributedContext,
    layout: Layout = PADDED,
) -> list[list[Sample]]:
    """Micro-batches of this rank's `active` samples, the same number on every rank.

    Ranks with sharded weights run every forward and backward pass together. A rank with fewer
    micro-batches gets idle ones: a single token of samples[0], with weight 0.
    """
    groups = list(micro_batches(active, token_budget, layout))
    first = samples[0]
    logprobs = first.logprobs and first.logprobs[:1]
    idle = replace(first, completion=first.completion[:1], logprobs=logprobs, weight=0.0)
    return groups + [[idle]] * (int(context.max(len(groups))) - len(groups))


def deal(samples: Sequence[Sample], layout: Layout, context: DistributedContext) -> list[Sample]:
    """This rank's samples, of about the same lengths on every rank: see `deal_to_all`."""
    return deal_to_all(samples, layout, context.size)[context.rank]


def deal_to_all(samples: Sequence[Sample], layout: Layout, ranks: int) -> list[list[Sample]]:
    """The samples of each of `ranks` ranks, of about the same lengths on every rank.

    Samples that share a prompt go to one rank while there is such a set for every rank; what is
    left is cut evenly.
    """
    runs = _runs(samples, layout)
    whole = len(runs) // ranks * ranks
    rest = [*chain.from_iterable(runs[whole:])]
    cuts = [-(-len(rest) * number // ranks) for number in range(ranks + 1)]
    return [
        [*chain.from_iterable(runs[rank:whole:ranks]), *rest[cuts[rank] : cuts[rank + 1]]]
        for rank in range(ranks)
    ]


def refuse_more_ranks_than_samples(problems_per_step: int, per_problem: int, ranks: int) -> None:
    """Raises UserError if a step has fewer samples than there are ranks."""
    count = problems_per_step * per_problem
    if count < ranks:
        raise UserError(
            f"problems_per_step={problems_per_step} gives {count} samples, fewer than the {ranks} "
            "processes; raise it"
        )


def _runs(samples: Iterable[Sample], layout: Layout) -> list[list[Sample]]:
    """Samples that share their student's prompt together, by rising length."""
    by_prompt: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(tuple(sample.student_prompt), []).append(sample)
    ordered = [
        s for group in by_prompt.values() for s in sorted(group, key=lambda sample: sample.longest)
    ]
    if not ordered:
        return []
    prompts, completions = [s.student_prompt for s in ordered], [s.completion for s in ordered]
    runs = [[ordered[index] for index in run] for run in layout.runs(prompts, completions)]
    return sorted(runs, key=lambda run: run[0].longest + sum(len(s.completion) for s in run[1:]))


def _tokens(samples: Sequence[Sample], layout: Layout) -> int:
    """Tokens of a micro-batch, padding included, under the prompts that make it longer."""
    completions = [sample.completion for sample in samples]
    student = [sample.student_prompt for sample in samples]
    teacher = [sample.teacher_prompt or [] for sample in samples]
    sides = (student, teacher) if teacher[0] else (student,)
    return max(layout.tokens(prompts, completions) for prompts in sides)
