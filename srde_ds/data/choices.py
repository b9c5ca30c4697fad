"""Which option of a multiple-choice item is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from srde_ds.data.sources.examples import letter_of


def right_option(answer: Any, options: Sequence[str], labels: Sequence[str] | None = None) -> int:
    """The number of the option that an answer means: by its text, its label, or its number from 0.

    Args:
        labels: the options' own labels, which may be numbers; None: A, B, and so on.

    Raises:
        ValueError: it means none of them; the message goes on after "field NAME is".

    Examples:
        >>> from srde_ds.data.choices import right_option
        >>> right_option("B", ["red", "blue"]), right_option("1", ["red", "blue"]), right_option(1, ["red", "blue"])
        (1, 1, 1)
        >>> right_option(1, ["red", "blue"], labels=["1", "2"])
        0
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # a column of integers that lacks some is one of floats
    named = list(labels) if labels is not None else [letter_of(number) for number in range(len(options))]
    numbered = bool(named) and all(label.strip().isdecimal() for label in named)
    if isinstance(answer, (str, int)) and not isinstance(answer, bool):
        text = str(answer).strip()
        if isinstance(answer, str) and answer in options:
            return list(options).index(answer)
        for known, wanted in ((named, text), ([label.upper() for label in named], text.upper())):
            if wanted in known:
                return known.index(wanted)
        if text in map(str, range(len(options))) and not numbered:
            return int(text)
    shown = json.dumps(answer, default=str)
    if not named:
        raise ValueError(f"{shown}, but there are no choices")
    known_as = f"its {'letter' if labels is None else 'label'} ({named[0]} to {named[-1]})"
    number = "" if numbered else f" or its number (0 to {len(options) - 1})"
    raise ValueError(f"{shown}: it must be one of the choices, {known_as}{number}")
