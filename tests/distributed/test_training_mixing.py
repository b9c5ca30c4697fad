"""The shares of the domains reach the rows that training sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from srde_ds.data.loader import RowStream
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import DOMAINS, Inputs, train_here


def domains_seen(flags: dict[str, Any]) -> tuple[str | None, list[tuple[int, str]]]:
    """The error of a training, if any, and (step, domain) of the rows of this process."""
    seen: list[tuple[int, str]] = []
    original = RowStream.micro_batch

    def micro_batch(stream: RowStream, step: int, micro: int, **place: int) -> dict[str, Any]:
        batch = original(stream, step, micro, **place)
        seen.extend((step, DOMAINS[index]) for index in batch["domain"].tolist())
        return batch

    with patch.object(RowStream, "micro_batch", micro_batch):
        return train_here(flags), seen


def test_weights_change_with_the_step(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    first, second, third = DOMAINS
    weights = f"{first}=1; 2: {second}=1,{third}=3"
    options: dict[str, Any] = {"max_steps": 4, "warmup_steps": 1, "save_steps": 2, "eval_steps": 0}
    for error, seen in two_ranks(domains_seen, inputs.flags(tmp_path / "run", domain_weights=weights, **options)):
        assert error is None
        assert {domain for step, domain in seen if step < 2} == {first}
        assert {domain for step, domain in seen if step >= 2} <= {second, third}
        assert {step for step, _ in seen} == {0, 1, 2, 3}
    # Going on, later shares may change; those of the rows that were read may not.
    options |= {"resume_from": str(tmp_path / "run/checkpoint-2")}
    other = inputs.flags(tmp_path / "resumed", **options, domain_weights=f"{second}=1")
    [(error, _), _] = two_ranks(domains_seen, other)
    assert error is not None and f"2 steps were drawn with domain_weights={weights}, mixing_temperature=1.0" in error
    later = f"{first}=1; 2: {third}=1"
    for error, seen in two_ranks(domains_seen, inputs.flags(tmp_path / "resumed", **options, domain_weights=later)):
        assert error is None
        assert {domain for _, domain in seen} == {third}


def test_shares_may_change_right_after_a_saved_step(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    """The row whose loss a resumed run compares is the one that was saved, not the first of the new shares."""
    first, _, third = DOMAINS
    options: dict[str, Any] = {"max_steps": 2, "warmup_steps": 1, "save_steps": 2, "eval_steps": 0}
    flags = inputs.flags(tmp_path / "run", domain_weights=f"{first}=1", **options)
    assert two_ranks(train_here, flags) == [None, None]
    changed = {"max_steps": 3, "resume_from": "latest", "domain_weights": f"{first}=1; 2: {third}=1"}
    for error, seen in two_ranks(domains_seen, flags | changed):
        assert error is None and {domain for _, domain in seen} == {third}


def test_what_does_not_fit_stops_every_rank(inputs: Inputs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path / "run", domain_weights="maths=1")
    for error in two_ranks(train_here, flags):
        assert error is not None and "unknown domain 'maths'" in error
    # What only the rows can tell, rank 0 finds while the other waits, and takes it along.
    flags = inputs.flags(tmp_path / "run", max_length=32)
    [error] = one_rank(train_here, flags)
    assert error is not None and "max_length=32" in error
    with pytest.raises(AssertionError, match="rank 1 of 2 failed:\nthe process died"):
        two_ranks(train_here, flags)
