"""The answer check."""

import pytest

from opsd_train.data import Problem
from opsd_train.rewards import extract_answer, is_correct


@pytest.mark.parametrize(
    ("expected", "text", "answer"),
    [
        ("5", r"so \boxed{5}.", "5"),
        ("5", r"\boxed{4} no, \boxed{ 5 }", "5"),
        ("1/2", r"\boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("a", r"\boxed{{a}", r"\boxed{{a}"),
        ("five", "first\n\n five \n\n", "five"),
        ("5", "5", "5"),
        ("5", "", None),
        ("five", " \n\t\n", None),
        ("5", "no number", None),
        ("84", "58 + 26 = 84", "84"),
        ("84", "The sum of 58 and 26 is 84.", "84"),
        ("-4", "3 - 7 = -4", "-4"),
        ("3", "It is 7 - 3", "3"),
        ("3", "It is 7-3", "3"),
        ("3", "f(2)-3", "3"),
        ("-5", "= - 5", "- 5"),
        ("1234", "in all 1,234 apples", "1234"),
        ("0.5", "about 0.5, or 1/2", "1/2"),
    ],
)
def test_extract_answer(expected, text, answer):
    assert extract_answer(text, expected) == answer


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("5", "5"),
        ("5", "I add them.\n5."),
        ("5", r"\boxed{5.0}"),
        ("5", "+5"),
        ("-5", " - 5 "),
        ("1234567", "1,234,567"),
        ("1,234", "1234"),
        ("12.5", "$12.50"),
        ("0.5", r"\boxed{1/2}"),
        ("0.1", "1/10"),
        ("Friday", "friday."),
        ("mother-in-law", "**Mother-in-law**"),
        ("yes", '"Yes."'),
        ("1, 2, 3", "1,2,3"),
        ("x + 1", "x+1"),
    ],
)
def test_right(expected, text):
    assert is_correct(Problem("p", "q", expected, expected), text)


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("5", "6"),
        ("5", ""),
        ("5", "5\nor 6"),
        ("5", r"\boxed{6} 5"),
        ("5", "55"),
        ("1234", "12,34"),
        ("1", "1/0"),
        ("0.3333", "1/3"),
        ("Friday", "Sunday"),
        ("1,2", "12"),
        ("5", "9" * 5000),
    ],
)
def test_wrong(expected, text):
    assert not is_correct(Problem("p", "q", expected, expected), text)
