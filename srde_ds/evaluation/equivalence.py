"""Whether two answers are the same number or expression, by the library math-verify."""

from __future__ import annotations

import logging
import math
import re

from math_verify import parse, verify

from srde_ds.inference.answers import exact_match, extract_answer, is_number

_FORMULA = re.compile(r"[\\^$]")
# A sum or product that was not carried out; 1.5 * 10^3 is a way to write a number.
_UNEVALUATED = re.compile(r"\d\s*(?:[+*×·-]|\\times|\\cdot)\s*\d(?!0?\s*\^)")
_QUOTIENT = re.compile(r"(\d{1,99})\s*/\s*(\d{1,99})|\\[dt]?frac\{(\d{1,99})\}\{(\d{1,99})\}")
_LONGEST_FORMULA = 200

# A timeout is an ordinary "no" here.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def is_mathematical(answer: str) -> bool:
    r"""Whether an answer is a number, or holds LaTeX (a backslash, `^` or `$`)."""
    answer = extract_answer(answer)
    return is_number(answer) or _FORMULA.search(answer) is not None


def equivalent(prediction: str, answer: str) -> bool:
    """Whether `prediction` (after `extract_answer`) has the value of a mathematical `answer`.

    Where the prediction is running text, its last formula or number is taken. A sum, product or quotient of numbers
    that was not carried out is no answer to a question for a number: it may repeat the question. Runs in the main
    thread only (the library limits its time by a signal).
    """
    answer, prediction = extract_answer(answer), extract_answer(prediction)
    same = exact_match(prediction, answer)
    found = [] if same else parse(_as_formula(prediction))
    if not same and not found:
        return False
    said = prediction if same else str(found[-1]).rpartition("=")[2]
    if is_number(answer) and _is_unevaluated(said) and not _is_unevaluated(answer):
        return False
    return same or bool(verify(parse(_as_formula(answer)), found))


def _is_unevaluated(text: str) -> bool:
    """Whether the text holds a sum, a product or a quotient that can be reduced."""
    quotient = _QUOTIENT.search(text)
    reducible = quotient is not None and math.gcd(*(int(part) for part in quotient.groups() if part)) > 1
    return reducible or _UNEVALUATED.search(text) is not None


def _as_formula(text: str) -> str:
    """In dollars, unless it is marked as a formula already or is running text, in which the library looks for one."""
    running = "\n" in text or len(text) > _LONGEST_FORMULA or len(text.split()) > 3 and "\\" not in text
    return text if running or "$" in text or r"\(" in text or r"\[" in text else f"${text}$"
