"""The result of a formatter: a conversation and an answer that can be checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from srde_ds.data.conversation import Message
from srde_ds.errors import SRDEError

MOST_OPTIONS = 26
"""letters for options"""


class BrokenRow(ValueError):
    """A row lacks something that its source promises."""


class HeldOutRow(BrokenRow):
    """A row whose `split` says that it is not for training; `example` is what it holds."""

    def __init__(self, split: str, example: Example) -> None:
        super().__init__(f"held out: its split is '{split}'")
        self.example = example


@dataclass(frozen=True)
class Example:
    """A row of a source as a conversation."""

    messages: list[Message]
    answer: str | None = None
    group: str | None = None
    """rows with the same group get the same split; it is a question that others are variants of, or a shared passage"""
    more: dict[str, Any] = field(default_factory=dict)
    """`tools`, `choices` and `tests`, as in records"""

    @property
    def answered(self) -> bool:
        """Whether it ends with an answer. Test rows whose labels are hidden do not."""
        return self.messages[-1]["role"] == "assistant"


def ask(prompt: str, response: str) -> list[Message]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def unanswered(question: str, group: str | None = None) -> Example:
    """A question whose answer is hidden, or is not a text."""
    return Example([{"role": "user", "content": question}], None, group)


def solved(question: str, reasoning: str, answer: str, *, group: str | None = None) -> Example:
    """A question whose response ends with the line `Answer: ...`."""
    response = f"{reasoning}\nAnswer: {answer}" if reasoning else f"Answer: {answer}"
    return Example(ask(question, response), answer, group)


def lettered_choice(
    question: str,
    options: Sequence[Any],
    right: int | None,
    *,
    context: str = "",
    reasoning: str = "",
    group: str | None = None,
) -> Example:
    """A question with lettered options. The response names the option, or explains it if there is a rationale.

    Args:
        right: the number of the right option; None: it is hidden, and so the question is not answered.

    Raises:
        BrokenRow: an option or the right one is missing, or there are more options than letters.
    """
    texts = [str(option).strip() for option in options if option is not None]
    if len(texts) < 2 or len(texts) < len(options) or not all(texts):
        raise BrokenRow("an option is missing")
    if len(texts) > MOST_OPTIONS:
        raise BrokenRow(
            f"there are {len(texts)} options, and letters for {MOST_OPTIONS}: give a question and its answer as texts"
        )
    if right is not None and not 0 <= right < len(texts):
        raise BrokenRow(f"the right option is number {right} of {len(texts)}")
    lettered = [f"{letter_of(index)}. {option}" for index, option in enumerate(texts)]
    prompt = "\n".join(filter(None, [context and f"{context}\n", question, *lettered]))
    group = group or context or question
    if right is None:
        return unanswered(prompt, group)
    return solved(prompt, reasoning or lettered[right], letter_of(right), group=group)


def of_a_source(error: SRDEError) -> str:
    """The message about a file, with the keys of a source in place of the command's options, without a full stop."""
    said = str(error).replace("its encoding, such as --encoding", "the source's encoding, such as")
    return re.sub(r"--(columns|ignore_columns|encoding)\b", r"the source's \1", said).removesuffix(".")


def trimmed(text: str) -> str:
    """A text without blank lines and space around it. The first line keeps its indentation, which code needs."""
    return re.sub(r"\A(?:[^\S\n]*\n)*(?: (?!\s))?", "", text.rstrip())


def letter_of(index: int) -> str:
    """0, 1, ... as A, B, ..."""
    return chr(ord("A") + index)
