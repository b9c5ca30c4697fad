"""The table of what counts as the same answer."""

from __future__ import annotations

import pytest

from srde_ds.inference.answers import exact_match, extract_answer

SAME = [
    ("42", "42"),
    ("  Forty  Two\n", "forty two"),
    ("1,000", "1000.0"),
    ("-1,234,567.50", "-1234567.5"),
    ("1e3", "1000"),
    (".5", "1/2"),
    ("+7", "7"),
    ("$5.", "5"),
    ("**Paris**.", "Paris"),
    ("'yes'", "Yes"),
    ("[1, 2, 3]", "1, 2, 3"),
    (r"So we get \boxed{12}.", "12"),
    (r"\boxed{3} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ("<answer>\nno\n</answer> done", "no"),
    ("12 + 3 = 15\n#### 15", "15"),
    ("The answer is: 8\nI am sure of it.", "8"),
    ("Answer: 3.", "3"),
    ("()[]", "()[]"),
    ("0", "-0"),
]
DIFFERENT = [
    ("41", "42"),
    ("-5", "5"),
    ("12,34", "1234"),
    ("1.5", "15"),
    ("", "0"),
    ("()", "[]"),
    ("5/0", "5"),
    ("e5", "5"),
    ("2015-3-1", "2015-03-01"),
    ("42 apples", "42"),
    ("no", "yes"),
    ("0x10", "16"),
    ("9" * 5000, "9"),
]


@pytest.mark.parametrize(("prediction", "answer"), SAME)
def test_same(prediction: str, answer: str) -> None:
    assert exact_match(prediction, answer)


@pytest.mark.parametrize(("prediction", "answer"), DIFFERENT)
def test_different(prediction: str, answer: str) -> None:
    assert not exact_match(prediction, answer)


def test_a_mark_without_anything_after_it_is_no_answer_mark() -> None:
    assert extract_answer("What could it be? The answer is") == "What could it be? The answer is"


def test_an_unclosed_box_is_not_taken() -> None:
    assert extract_answer(r"\boxed{12") == r"\boxed{12"
