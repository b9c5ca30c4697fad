"""Which option of a multiple-choice item is right."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from srde_ds.data.sources.examples import letter_of


def right_option(answer: Any, options: Sequence[str], labels: Sequence[str] | None = None) -> int:
    """The number of the option that an answer means: by its label, its text, or its number from 0.

    Args:
        labels: the options' own labels, which may be numbers; None: A, B, and so on.

    Raises:
        ValueError: it means none of them, or, without labels, one by its letter or number and another by its text; the
            message goes on after "field NAME is".

    Examples:
        >>> from srde_ds.data.choices import right_option
        >>> right_option("B", ["red", "blue"]), right_option("1", ["red", "blue"]), right_option(1, ["red", "blue"])
        (1, 1, 1)
        >>> right_option(1, ["red", "blue"], labels=["1", "2"])
        0
    """
    own = [_plain(label) for label in labels or ()]
    named = own if labels is not None else [letter_of(number) for number in range(len(options))]
    if isinstance(answer, str | int | float) and not isinstance(answer, bool):
        text = _plain(answer)
        by_label = named.index(text) if named.count(text) == 1 else None
        by_text = list(options).index(answer) if isinstance(answer, str) and answer in options else None
        if labels is None and by_label is not None and by_text is not None and by_label != by_text:
            raise ValueError(
                f"{json.dumps(answer)}, which is the text of one choice and the letter of another: give its number "
                "(from 0), or the choices with their letters"
            )
        position = int(text) if labels is None and text in map(str, range(len(options))) else None
        if position is not None and by_text is not None and position != by_text:
            raise ValueError(
                f"{json.dumps(answer)}, which is the text of one choice and the number of another: give its letter, or "
                "the choices with their letters"
            )
        found = by_text if by_label is None else by_label
        if found is not None:
            return found
        caseless = [label.upper() for label in named]
        if caseless.count(text.upper()) == 1:
            return caseless.index(text.upper())
        # A number is a position only where no label is one.
        if text in map(str, range(len(options))) and not any(re.search(r"\d", label) for label in own):
            return int(text)
    shown = json.dumps(answer, default=str)
    if not named:
        raise ValueError(f"{shown}, but there are no choices")
    known_as = f"its {'letter' if labels is None else 'label'} ({named[0]} to {named[-1]})"
    number = f" or its number (0 to {len(options) - 1})" if labels is None else ""
    raise ValueError(f"{shown}: it must be one of the choices, {known_as}{number}")


def _plain(label: Any) -> str:
    """A label without outer space; a whole number without a decimal point, which a column that lacks some adds."""
    text = str(label).strip()
    return text.removesuffix(".0") if re.fullmatch(r"\d+\.0", text) else text
