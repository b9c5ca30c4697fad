"""The table of what counts as the same answer."""

from __future__ import annotations

import pytest

from srde_ds.inference.answers import complete_part, exact_match, extract_answer

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
    ("<think>\n\n</think>\n\nB", "B"),
    (r"<think>maybe \boxed{5}</think><answer>4</answer>", "4"),
    ("it is C, no</think>B", "B"),  # the prompt opened the thought
    ("[THINK]C[/THINK]B", "B"),
    ("B. iron", "B"),
    ("(B) iron", "b"),
    ("**B** iron", "B"),
    ("The answer is B) iron", "B"),
    ("**Final Answer**: B", "B"),
    ("B\nsince iron is a metal: B.", "B\nsince iron is a metal: B"),
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
    ("<think>the answer is 8</think>\n9", "8"),
    ("<think>the answer is B", "B"),
    ("A ball falls.", "A"),
    ("A* search", "A"),
    ("A. iron\nB. gold", "A"),
    ("(A) and (B)", "A"),
    ("C. iron", "B"),
    ("E", "E. coli"),
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


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("3 + 4 = 7, so 7 - 5", ""),
        ("The answer is 1", ""),
        ("#### 12\nThe answer is 1", "#### 12"),
        (r"It is \boxed{4}, as 2", r"It is \boxed{4}, as 2"),
        (r"It is \boxed{4", ""),
        ("<answer>4</answer> is", "<answer>4</answer> is"),
        ("B. iron has", "B. iron has"),
        (r"<think>So \boxed{4}", ""),
    ],
)
def test_a_text_that_was_cut_answers_by_what_is_complete(text: str, part: str) -> None:
    assert complete_part(text) == part
