"""Compares answers as numbers or expressions, with the library math-verify."""

from __future__ import annotations

import logging
import math
import re

from math_verify import parse, verify

from srde_ds.inference.answers import answer_part, exact_match, extract_answer, is_number

_FORMULA = re.compile(r"[\\^$]")
# A sum or product that has not been calculated; but 1.5 * 10^3 is just a way to write a number.
_UNEVALUATED = re.compile(r"\d\s*(?:[+*×·-]|\\times|\\cdot)\s*\d(?!0?\s*\^)")
_QUOTIENT = re.compile(r"(\d{1,99})\s*/\s*(\d{1,99})|\\[dt]?frac\{(\d{1,99})\}\{(\d{1,99})\}")
# Words beside a number, such as a unit, which the library would read as a product of letters; but not names of maths.
_WORD = re.compile(r"[^\W\d_]{2}")
_MATHS = re.compile(r"\\|\b(?:pi|sqrt|root|exp|log|ln|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|inf(?:inity)?)\b", re.I)
# Borders of numbers in scripts without spaces (Thai to Hangul, full-width forms), where the library needs a space.
_UNSPACED = "[\u0e00-\u0fff\u3000-\ud7ff\uff01-\uffef]"
_BORDER = re.compile(rf"(?<={_UNSPACED})(?=[-+$]?\d)|(?<=\d)(?={_UNSPACED})")
_LONGEST_FORMULA = 200
_LONGEST_EXPLANATION = 500
# A number or formula that a text begins with, and the words, brackets or sentences that explain it. "12 or 13" and
# "5 to 7" go on after the number. A sign that has a meaning, as in ±3 and √16, is not skipped.
_EXPLAINED = re.compile(
    r"[ \"'`“”‘’*()\[\]{}$€£¥₹₩₽]*((?:[+-]?[\d.]|[+-]?\\|[^\W\d_]\s*=).*?)"
    r"(?:[.,;:!?]\s+|(?<!\{)\s+(?=[^\W\d_]{2})|\s+(?=\([^)]{0,80}[^\W\d_]{2}))(?!(?:or|and|to|percent)\b)"
)
_END_OF_CALCULATION = re.compile(r"[.;!?]\s|\b(?:because|since)\b")
# The number was part of a calculation whose result follows, but "which is less than 12" gives none.
_RESULT = re.compile(r"(?:=|\b(?:equals|is)\b)(?:(?!\b(?:not|than|too)\b)\D)*\d")

# A timeout simply counts as "no".
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def is_mathematical(answer: str) -> bool:
    r"""Whether an answer is a number, or contains LaTeX (a backslash, `^` or `$`)."""
    answer = extract_answer(answer)
    return is_number(answer) or _FORMULA.search(answer) is not None


def equivalent(prediction: str, answer: str) -> bool:
    """Whether `prediction` (after `extract_answer`) has the value of a mathematical `answer`.

    If the prediction is running text, its last formula or number counts. If the answer is a number, the one that
    directly follows a mark counts, unless it is the first of a calculation, and an uncalculated sum, product or
    quotient is not accepted: it may repeat the question. This works only in the main thread, since the library limits
    its time by a signal.
    """
    answer, prediction = answer.replace("−", "-"), prediction.replace("−", "-")
    answer, (prediction, marked) = extract_answer(answer), answer_part(prediction)
    if marked and is_number(answer):
        prediction = _explained(prediction)
    same = exact_match(prediction, answer)
    of_words = is_number(answer) and _WORD.search(prediction) and not _MATHS.search(prediction)
    found = [] if same else parse(_BORDER.sub(" ", prediction) if of_words else _as_formula(prediction))
    if not same and not found:
        return False
    said = prediction if same else str(found[-1]).rpartition("=")[2]
    if is_number(answer) and _is_unevaluated(said) and not _is_unevaluated(answer):
        return False
    return same or bool(verify(parse(_as_formula(answer)), found))


def _explained(text: str) -> str:
    """The number or formula that a text begins with and explains; the whole text if there is none or a result follows.

    Only the first `_LONGEST_EXPLANATION` characters are looked at, with single spaces, so that the time is bounded.
    """
    start = " ".join(text.split())[:_LONGEST_EXPLANATION]
    found = _EXPLAINED.match(start)
    if found is None:
        return text
    rest = _END_OF_CALCULATION.split(start[found.end(1) :], maxsplit=1)[0]
    return text if _RESULT.search(rest) else found[1].strip(" $*_")


def _is_unevaluated(text: str) -> bool:
    """Whether a text contains a sum, product or quotient that can be calculated."""
    quotient = _QUOTIENT.search(text)
    reducible = quotient is not None and math.gcd(*(int(part) for part in quotient.groups() if part)) > 1
    return reducible or _UNEVALUATED.search(text) is not None


def _as_formula(text: str) -> str:
    """The text between dollars, unless it is marked as a formula or is running text, which the library searches."""
    running = "\n" in text or len(text) > _LONGEST_FORMULA or len(text.split()) > 3 and "\\" not in text
    return text if running or "$" in text or r"\(" in text or r"\[" in text else f"${text}$"
