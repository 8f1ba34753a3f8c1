"""Batches cut by a token budget: every item once, in order, as many in each as fit."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_train.data.batches import token_batches

LENGTHS = st.lists(st.integers(1, 30), max_size=40)


def cut(lengths: list[int], budget: int, packed: bool) -> list[list[int]]:
    """The lengths of each batch's items."""
    items = [((number, length), length) for number, length in enumerate(lengths)]
    batches = list(token_batches(items, budget, packed))
    assert list(itertools.chain(*batches)) == [item for item, _ in items]
    return [[length for _, length in batch] for batch in batches]


def size(batch: list[int], packed: bool) -> int:
    return sum(batch) if packed else len(batch) * max(batch)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@given(lengths=LENGTHS, budget=st.integers(30, 90))
def test_each_batch_keeps_to_the_budget_and_takes_what_fits(packed, lengths, budget) -> None:
    batches = cut(lengths, budget, packed)
    assert all(size(batch, packed) <= budget for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert size([*batch, following[0]], packed) > budget


@pytest.mark.parametrize(
    ("packed", "batches"),
    [(False, [[2, 3], [4, 4], [9], [1]]), (True, [[2, 3, 4], [4], [9, 1]])],
    ids=["padded", "packed"],
)
def test_padding_counts_unless_packed(packed: bool, batches: list[list[int]]) -> None:
    assert cut([2, 3, 4, 4, 9, 1], 10, packed) == batches


def test_an_item_beyond_the_budget_stands_alone() -> None:
    assert cut([2, 50, 2], 10, False) == [[2], [50], [2]]
    assert cut([], 10, False) == []
