"""Rows of a batch: which sequences share a prompt, what a token reads, who gets which samples."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsd_train.data.batches import Sample, deal, micro_batches
from opsd_train.data.layout import PADDED, Layout, make_batch
from opsd_train.data.problems import Problem
from opsd_train.distributed.context import DistributedContext

CPU = torch.device("cpu")
SHARED = Layout("shared", hidden_size=1000)  # worth it for any prompt of these tests
SIZES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=6)


def sample(prompt: int, completion: int, number: int = 0, teacher: int = 0) -> Sample:
    """`prompt` and `completion` tokens; samples of one `number` have the same prompts."""
    ids = [number + 2] * prompt
    return Sample(Problem(str(number), "", "", ""), ids, [1] * teacher or None, [1] * completion)


def samples_of(sizes: list[list[int]], teacher: bool = False) -> list[Sample]:
    """Groups by their completions' lengths, with prompts of different lengths."""
    return [
        sample(4 + 3 * number, size, number, teacher=(5 + number) * teacher)
        for number, group in enumerate(sizes)
        for size in group
    ]


def texts(samples: list[Sample]) -> tuple[list, list]:
    return [s.student_prompt for s in samples], [s.completion for s in samples]


# ------------------------------------------------------------------------------------------ a batch


def test_a_shared_row() -> None:
    """The prompt's last token predicts the first token of both completions."""
    prompts, completions = [[1, 2], [1, 2], [3]], [[4, 5], [6, 7, 8], [9]]
    batch = make_batch(prompts, completions, 0, CPU, SHARED)
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 6, 7, 8], [3, 9, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.rows.tolist() == [0] * 5 + [1] and batch.columns.tolist() == [1, 2, 1, 4, 5, 0]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 9]
    assert batch.mask is not None and batch.mask.shape == (2, 1, 7, 7)
    reads = [[k for k in range(7) if row[k]] for row in batch.mask[0, 0].tolist()]
    assert reads == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    assert batch.mask[1, 0, :2, 2:].sum() == 0  # nothing reads the padding


def test_without_a_shared_prompt_the_batch_is_the_padded_one() -> None:
    prompts, completions = texts([sample(3, 4, number) for number in range(3)])
    for one, other in zip(
        vars(make_batch(prompts, completions, 0, CPU, SHARED)).values(),
        vars(make_batch(prompts, completions, 0, CPU)).values(),
        strict=True,
    ):
        assert (one is None and other is None) or torch.equal(one, other)


def test_long_completions_do_not_share() -> None:
    """Their attention to each other, which is masked, would cost more than the prompt again."""
    layout = Layout("shared", hidden_size=384)
    for prompt, size, runs in ((50, 40, [3]), (50, 110, [1, 1, 1]), (10, 50, [1, 1, 1])):
        made = layout.runs(*texts([sample(prompt, size)] * 3))
        assert [len(run) for run in made] == runs
    mixed = layout.runs(*texts([sample(50, size) for size in (60, 90, 90, 90)]))
    assert mixed == [[0, 1], [2, 3]]


def test_one_sequence_beyond_the_window_keeps_all_apart() -> None:
    within, beyond = [sample(5, 3), sample(5, 5)], [sample(5, 3), sample(5, 6)]
    layout = replace(SHARED, window=10)
    assert layout.runs(*texts(within)) == [[0, 1]] and layout.runs(*texts(beyond)) == [[0], [1]]


# ------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@given(sizes=SIZES, budget=st.integers(30, 120), window=st.sampled_from([20, math.inf]))
def test_micro_batches_keep_to_the_budget(teacher, sizes, budget, window) -> None:
    """A prompt counts once for the samples that share it."""
    layout, samples = replace(SHARED, window=window), samples_of(sizes, teacher)
    made = list(micro_batches(samples, budget, layout))
    assert Counter(map(id, itertools.chain(*made))) == Counter(map(id, samples))
    for group in made:
        prompts, completions = texts(group)
        assert make_batch(prompts, completions, 0, CPU, layout).input_ids.numel() <= budget
        if teacher:
            prompts = [s.teacher_prompt for s in group]
            assert make_batch(prompts, completions, 0, CPU, layout).input_ids.numel() <= budget


def test_a_group_is_cut_only_where_it_must_be() -> None:
    groups = [[5] * 4, [5] * 4, [5] * 4]
    samples = [replace(s, student_prompt=s.student_prompt[:4]) for s in samples_of(groups)]
    shuffled = samples[::2] + samples[1::2]
    for budget, wanted in (
        (72, ["000011112222"]),
        (50, ["00001111", "2222"]),
        (24, ["0000", "1111", "2222"]),
        (19, ["000", "01", "111", "222", "2"]),  # two rows of 9
    ):
        made = list(micro_batches(shuffled, budget, SHARED))
        assert ["".join(s.problem.id for s in group) for group in made] == wanted


@given(sizes=SIZES, ranks=st.integers(1, 9), kind=st.sampled_from([PADDED, SHARED]))
def test_every_sample_goes_to_one_rank(sizes, ranks, kind) -> None:
    samples = samples_of(sizes)
    parts = [deal(samples, kind, DistributedContext(CPU, r, ranks)) for r in range(ranks)]
    assert Counter(map(id, itertools.chain(*parts))) == Counter(map(id, samples))
    if kind is PADDED:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_get_whole_groups_and_a_part_of_what_is_left() -> None:
    samples = samples_of([[3] * 4] * 5)
    parts = [deal(samples, SHARED, DistributedContext(CPU, r, 2)) for r in range(2)]
    names = [[s.problem.id for s in part] for part in parts]
    assert names == [list("0000222244"), list("1111333344")]
    ordered = sorted(samples, key=lambda s: s.longest)
    assert deal(samples, PADDED, DistributedContext(CPU, 1, 2)) == ordered[1::2]
