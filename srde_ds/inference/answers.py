"""Decides whether a generated answer is right, by normalised exact match."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from srde_ds.data.conversation import THOUGHT_MARKS, after_thought

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARK = re.compile(r"####|\b(?:the\s+)?(?:final\s+)?answer[*\s]*(?:is\s*:?|:)", re.IGNORECASE)
# "B. iron", "(B) iron" and "**B** iron", but not "A ball" and "A* search".
_LETTERED = re.compile(r"\W*(?:([A-Z])\**[.):\]]+\**|\*+([A-Z])\*+)(?:\s|$)", re.IGNORECASE)
_OTHER_LETTER = re.compile(r"(?:\n\W*|\()([A-Z])[.):\]]", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_LONGEST_NUMBER = 1000
_AROUND = " \t\n.,;:!?\"'`*()[]{}$" + "。，、；：！？．…·「」『』《》〈〉（）【】“”‘’„‚«»‹›¡¿"


def extract_answer(text: str) -> str:
    r"""The part of `text` that answers.

    It is the last `\boxed{...}`, else the last `<answer>...</answer>`, else the line after the last `####`, `answer is`
    or `answer:`, else the whole text. Thoughts are no part of it, see `without_thoughts`.
    """
    return answer_part(text)[0]


def answer_part(text: str) -> tuple[str, bool]:
    """The result of `extract_answer`, and whether it is the line after a mark, which begins with the answer."""
    text = without_thoughts(text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip(), False
    if tags := _TAG.findall(text):
        return str(tags[-1]).strip(), False
    if marks := list(_MARK.finditer(text)):
        rest = text[marks[-1].end() :].strip()
        if rest:
            return rest.splitlines()[0].strip(), True
    return text.strip(), False


def without_thoughts(text: str) -> str:
    """What follows the last thought; nothing if that is not closed."""
    said = after_thought(text)
    return "" if any(mark in said for mark in THOUGHT_MARKS) else said


def complete_part(text: str) -> str:
    """The part of a text that was cut off which holds a complete answer; empty if there is none.

    A complete answer is in a closed box or tag, follows a mark on a line that ends, or is a letter that the text begins
    with.
    """
    text = without_thoughts(text)
    if _last_boxed(text) is not None or _TAG.search(text) or _LETTERED.match(text):
        return text
    whole_lines = text.rpartition("\n")[0]
    return whole_lines if _MARK.search(whole_lines) else ""


def exact_match(prediction: str, answer: str) -> bool:
    """Whether `prediction` (after `extract_answer`) says the same as `answer`.

    Texts are equal if they differ only in case, white space and surrounding punctuation, and numbers if their values
    are (1,000 = 1000.0 = 1e3, 1/2 = 0.5). A text of punctuation only is compared as it is. If `answer` is a letter, its
    option's text may follow in the prediction: "B. iron".
    """
    said = extract_answer(prediction)
    left, right = _normalise(said), _normalise(extract_answer(answer))
    if left == right or (len(right) == 1 and right.isalpha() and _letter(said) == right):
        return True
    value = _number(left)
    return value is not None and value == _number(right)


def is_number(text: str) -> bool:
    """Whether `text` is a decimal number or a quotient of two, which `exact_match` compares by value."""
    return _number(_normalise(text)) is not None


def _letter(text: str) -> str | None:
    """The small letter of the option that a text begins with, unless it goes on to others."""
    found = _LETTERED.match(text)
    if found is None:
        return None
    letter = (found[1] or found[2]).casefold()
    others = {other.casefold() for other in _OTHER_LETTER.findall(text, found.end())}
    return letter if others <= {letter} else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _normalise(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    # A leading point belongs to a number such as ".5".
    return text if _number(text) is not None else text.strip(_AROUND) or text


def _number(text: str) -> Fraction | None:
    """The exact value of a decimal number or a quotient of two of them."""
    over, slash, under = text.partition("/")
    above, below = _decimal(over.strip()), _decimal(under.strip()) if slash else Fraction(1)
    return None if above is None or not below else above / below


def _decimal(text: str) -> Fraction | None:
    if (
        len(text) > _LONGEST_NUMBER
        or not _NUMBER.fullmatch(text)
        or not any(c.isdigit() for c in text.casefold().partition("e")[0])
    ):
        return None
    return Fraction(text.replace(",", ""))
