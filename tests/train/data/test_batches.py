"""Batches cut by a token budget: every item once, in order, as many in each as fit."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from opsd_train.data.batches import token_batches

LENGTHS = st.lists(st.integers(1, 30), max_size=40)


def cut(lengths: list[int], budget: int) -> list[list[int]]:
    """The lengths of each batch's items."""
    items = [((number, length), length) for number, length in enumerate(lengths)]
    batches = list(token_batches(items, budget))
    assert list(itertools.chain(*batches)) == [item for item, _ in items]
    return [[length for _, length in batch] for batch in batches]


@given(lengths=LENGTHS, budget=st.integers(30, 90))
def test_each_batch_keeps_to_the_budget_and_takes_what_fits(lengths, budget) -> None:
    batches = cut(lengths, budget)
    assert all(len(batch) * max(batch) <= budget for batch in batches)
    for batch, following in itertools.pairwise(batches):
        longer = [*batch, following[0]]
        assert len(longer) * max(longer) > budget


def test_padding_counts() -> None:
    assert cut([2, 3, 4, 4, 9, 1], 10) == [[2, 3], [4, 4], [9], [1]]


def test_an_item_beyond_the_budget_stands_alone() -> None:
    assert cut([2, 50, 2], 10) == [[2], [50], [2]]
    assert cut([], 10) == []
