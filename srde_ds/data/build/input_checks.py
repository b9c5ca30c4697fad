"""Checks all records of a build from files, before anything is tokenised."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import check_markers, tokenize
from srde_ds.data.records import Record
from srde_ds.errors import SRDEError

log = logging.getLogger(__name__)

FEW_RECORDS = 100
"""a domain with fewer training records gets a warning"""
_MOST_SHAPES = 1000


class InputChecks:
    """Sees every record of every split once."""

    def __init__(self, domains: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._domains, self._tokenizer = list(domains), tokenizer
        self._counts: Counter[str] = Counter()
        self._trained: dict[int, str] = {}
        """place of the first record with a question, by the question's hash"""
        self._held_out: dict[int, str] = {}
        self._held_out_before: dict[int, str] = {}
        """the same of the questions before the last one"""
        self._trained_plain: set[int] = set()
        self._held_out_plain: dict[int, str] = {}
        """the same, ignoring case, spaces and the system message"""
        self._shapes: set[Any] = set()

    def add(self, split: str, record: Record) -> None:
        """Take a record into account.

        Raises:
            SRDEError: the record holds the EOS token, or the chat template refuses its kind of conversation.
        """
        check_markers(self._tokenizer, record)
        shape = tuple((message["role"], *sorted(message)) for message in record.messages)
        if shape not in self._shapes and len(self._shapes) < _MOST_SHAPES:
            tokenize([record], self._tokenizer)
            self._shapes.add(shape)
        asked = _asked(record)
        system = record.messages[0]["content"] if record.messages[0]["role"] == "system" else None
        if split == "train":
            self._counts[record.domain] += 1
            for turns in asked:
                self._trained.setdefault(hash((system, turns)), record.where)
                self._trained_plain.add(_plain_hash(turns))
        else:
            self._held_out.setdefault(hash((system, asked[-1])), record.where)
            for turns in asked[:-1]:
                self._held_out_before.setdefault(hash((system, turns)), record.where)
            self._held_out_plain.setdefault(_plain_hash(asked[-1]), record.where)

    def finish(self, training: str, held_out: str, *, optional: Collection[str] = ()) -> None:
        """Check the records as a whole, after the last one.

        Args:
            training, held_out: the files as the user named them.
            optional: domains that need no training records.

        Raises:
            SRDEError: a domain without training records, or held-out prompts that training would see.
        """
        empty = [domain for domain in self._domains if not self._counts[domain] and domain not in optional]
        if empty:
            raise SRDEError(f"'{training}' has no record of domain '{empty[0]}': add some, or leave it out of domains.")
        leaked = [asked for asked in self._held_out if asked in self._trained]
        if leaked:
            raise SRDEError(
                f"'{held_out}': {len(leaked)} held-out questions are also in training; for example, "
                f"{self._held_out[leaked[0]]} asks what {self._trained[leaked[0]]} asks. Remove them from one of the "
                "files."
            )
        if before := [asked for asked in self._held_out_before if asked in self._trained]:
            log.warning(
                "%s: %d questions before the last one of held-out conversations are also in training; for example, %s "
                "asks what %s asks. Remove these conversations, unless such turns are phrases that all begin with.",
                held_out,
                len(before),
                self._held_out_before[before[0]],
                self._trained[before[0]],
            )
        alike = [place for plain, place in self._held_out_plain.items() if plain in self._trained_plain]
        if alike:
            log.warning(
                "%s: %d of %d held-out questions equal a training question but for case, spaces or the system message, "
                "the first is %s. Remove them from one of the files, as their scores would be too good, unless the "
                "system message holds what is asked about.",
                held_out,
                len(alike),
                len(self._held_out_plain),
                alike[0],
            )
        counts = {domain: self._counts[domain] for domain in self._domains if domain not in optional}
        few = {domain: count for domain, count in counts.items() if count < FEW_RECORDS}
        if few:
            log.warning(
                "domains with fewer than %d training records: %s. An expert learns little from so few.",
                FEW_RECORDS,
                ", ".join(f"{domain} has {count}" for domain, count in few.items()),
            )


def _asked(record: Record) -> list[tuple[Any, ...]]:
    """The messages before each response, without the system message."""
    turns = [(m["role"], str(m.get("content"))) for m in record.messages if m["role"] != "system"]
    return [tuple(turns[:i]) for i, (role, _) in enumerate(turns) if role == "assistant"]


def _plain_hash(turns: tuple[Any, ...]) -> int:
    return hash(tuple((role, " ".join(content.casefold().split())) for role, content in turns))
