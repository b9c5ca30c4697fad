"""How an item is scored, which depends on its fields."""

from __future__ import annotations

from typing import Literal

from srde_ds.data.records import Record
from srde_ds.evaluation.equivalence import equivalent, is_mathematical
from srde_ds.evaluation.sandbox import Sandbox, passes_tests, program_in
from srde_ds.inference.answers import complete_part, exact_match

Scoring = Literal["choice", "code", "math", "exact"]


def scoring_of(record: Record, *, run_code: bool) -> Scoring | None:
    """`choices`: by likelihood; `tests`: by running them, if that is allowed; `answer`: as mathematics if it is a
    number or a formula, else as text. None: the item has nothing to score by."""
    if record.choices is not None:
        return "choice"
    if record.tests is not None:
        return "code" if run_code else None
    if record.answer is None:
        return None
    return "math" if is_mathematical(record.answer) else "exact"


def is_right(
    prediction: str, record: Record, scoring: Scoring, sandbox: Sandbox | None = None, *, cut: bool = False
) -> bool:
    """Whether a generated answer, or the likeliest choice, is right. Programs need a sandbox.

    Args:
        cut: the text was cut off. It answers only by what is complete in it, see `complete_part` and `program_in`.
    """
    if scoring == "code":
        assert sandbox is not None, "scoring_of gives 'code' only if programs may be run"
        return passes_tests(program_in(prediction, cut=cut), str(record.tests), sandbox)
    answer = str(record.answer)
    if scoring == "choice":
        return prediction == answer
    if cut:
        prediction = complete_part(prediction)
    return equivalent(prediction, answer) if scoring == "math" else exact_match(prediction, answer)
