"""The passes before the selection: read the records of every source, and apply rules that compare them."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from srde_ds.data.build.artifacts import Artifact, ArtifactStore, code_fingerprint, fingerprint, slices
from srde_ds.data.build.decontaminate import contaminated, evaluation_ngrams, find_ngrams, read_evaluation_file
from srde_ds.data.build.duplicates import exact_duplicates, gather_signatures, near_duplicates
from srde_ds.data.build.options import BuildOptions
from srde_ds.data.build.row_rules import MINHASH_VERSION, make_records
from srde_ds.data.build.selection import Pool, joined, mixed
from srde_ds.data.build.tables import read_table
from srde_ds.data.sources.examples import Example, HeldOutRow
from srde_ds.data.sources.reading import ROWS_A_PART, OpenSource, open_source
from srde_ds.data.sources.registry import Source, load_sources
from srde_ds.data.sources.supply import GENERATED_AT_ONCE
from srde_ds.errors import SRDEError, nearest
from srde_ds.utils.retry import SourceError

log = logging.getLogger(__name__)

MOST_ALIKE = 10
"""More system messages with one question than this may hold what is asked about; more conversations with one beginning
than this are not about it."""


@dataclass
class Questions:
    """One entry for each answer of each record, in order: hashes of all that comes before it."""

    record: np.ndarray
    asked: np.ndarray
    """without the system message"""
    system: np.ndarray
    """of the system message"""
    ends: np.ndarray
    """`[records]`: one past each record's last entry"""

    @cached_property
    def key(self) -> np.ndarray:
        """What tells questions apart: their words, and the system message where that holds what is asked about.

        It does if the same words stand under many system messages, each of which has fewer questions than that: texts
        to be summarised. Under a dozen characters for an assistant stand many questions each.
        """
        pairs = joined(self.asked, self.system)
        _, distinct = np.unique(pairs, return_index=True)
        words, word_of, systems = np.unique(self.asked[distinct], return_inverse=True, return_counts=True)
        _, system_of, questions = np.unique(self.system[distinct], return_inverse=True, return_counts=True)
        questions_of_a_system = np.bincount(word_of, questions[system_of], len(words)) / systems
        about_system = words[(systems > MOST_ALIKE) & (systems > questions_of_a_system)]
        return np.where(np.isin(self.asked, about_system), pairs, self.asked)

    @property
    def last(self) -> np.ndarray:
        """`[records]`: `key` of each record's last answer."""
        return self.key[self.ends - 1]

    @property
    def beginnings(self) -> np.ndarray:
        """`[records]`: `key` of the first answer, so that a question's conversations get one split; of the last one
        where many conversations begin alike, with instructions for instance."""
        last = self.last
        first = self.key[np.concatenate([[0], self.ends[:-1]]).astype(int)] if len(last) else last
        _, distinct = np.unique(joined(first, last), return_index=True)
        openings, conversations = np.unique(first[distinct], return_counts=True)
        return np.where(np.isin(first, openings[conversations > MOST_ALIKE]), last, first)

    def leaked(self, held_out: np.ndarray) -> np.ndarray:
        """`[records]` bool: those that ask, at any of their answers, what a held-out record asks at its last one.

        Args:
            held_out: `[records]` bool.
        """
        found = np.zeros(len(self.ends), bool)
        found[self.record[np.isin(self.key, self.last[held_out])]] = True
        return found

    def apart(self, content: np.ndarray) -> np.ndarray:
        """`[records]`: hashes of what records say, with the system message where that holds what is asked about."""
        ends = self.ends - 1
        return np.where(self.key[ends] != self.asked[ends], joined(content, self.system[ends]), content)


@dataclass
class Records:
    """The files of records of all sources."""

    parts: list[Artifact]
    source_of: list[int]
    """number of each part's source"""

    @property
    def lengths(self) -> list[int]:
        """Number of records in each file, in order."""
        return [made.figures["kept"] for made in self.parts]

    def column(self, name: str) -> np.ndarray:
        """`[records]`: a column of all files, concatenated."""
        return np.concatenate([read_table(made.path)[name].to_numpy() for made in self.parts])

    def questions(self) -> Questions:
        """What the records ask."""
        lists = [read_table(made.path)["asked"] for made in self.parts]
        asked = np.concatenate([pc.list_flatten(each).to_numpy() for each in lists])
        counts = np.concatenate([pc.list_value_length(each).to_numpy() for each in lists])
        record = np.repeat(np.arange(len(counts)), counts)
        return Questions(record, asked, self.column("system")[record], np.cumsum(counts))


def records_of(opened: Sequence[OpenSource], store: ArtifactStore) -> Records:
    """Read, format and clean the rows of every source, part by part."""
    modules = (
        "build.row_rules", "choices", "conversation", "files", "forms", "records", "sources.examples",
        "sources.formatters", "sources.reading", "sources.registry", "synthetic.tasks", "synthetic.science",
    )  # fmt: skip
    code = code_fingerprint(*(f"srde_ds.data.{name}" for name in modules))
    work, source_of = [], []
    for number, one in enumerate(opened):
        source = one.source
        labels = {"domain": source.domain, "source": source.name, "revision": one.revision}
        read = [source.formatter, source.columns, source.ignore_columns, source.split, source.data_files]
        how = [*read, labels, source.near_duplicates]
        for start, stop in slices(one.reader.count, GENERATED_AT_ONCE if source.generated else ROWS_A_PART):
            key = fingerprint(code, one.content, how, MINHASH_VERSION, start, stop)
            arguments = {"reader": one.reader, "start": start, "stop": stop, "labels": labels}
            work.append((key, arguments | {"near_duplicates": source.near_duplicates}))
            source_of.append(number)
    return Records(store.run("records", make_records, work), source_of)


def apply_rules(
    records: Records, opened: Sequence[OpenSource], options: BuildOptions, ngrams: Path | None, store: ArtifactStore
) -> Pool:
    """Leave out duplicates, evaluation items, and held-out questions that also occur in another split.

    Args:
        ngrams: the file that `ngrams_of` gives.
    """
    lengths = records.lengths
    source = np.repeat(records.source_of, lengths)
    keep = np.ones(len(source), bool)
    removed: dict[str, Counter[str]] = {one.source.name: Counter() for one in opened}

    def remove(rule: str, which: np.ndarray) -> None:
        counts = np.bincount(source[which & keep], minlength=len(opened))
        for one, count in zip(opened, counts.tolist(), strict=True):
            removed[one.source.name][rule] += count
        keep[which] = False

    questions = records.questions()
    with store.timed("duplicates"):
        said = records.column("content")
        content = questions.apart(said)
        remove("exact duplicate", exact_duplicates(content))
        # Signatures are of what is said after the system message.
        candidates = keep & np.array([one.source.near_duplicates for one in opened], bool)[source] & (content == said)
        if candidates.any():
            file = store.folder / f"signatures.{os.getpid()}.tmp"
            try:
                signatures = gather_signatures([made.path for made in records.parts], lengths, file)
                remove("near duplicate", near_duplicates(signatures, candidates, options.near_duplicate_threshold))
            finally:
                file.unlink(missing_ok=True)
    forms_of_words = 0
    if ngrams is not None:
        flagged, forms_of_words = contaminated(*_matches(records, ngrams, store), questions.last, keep)
        remove("in an evaluation set", flagged)
    group = records.column("group")
    split = split_of(np.where(group, group, questions.beginnings), options)
    remove("held-out question", (split == 0) & questions.leaked(keep & (split > 0)))
    part = np.repeat(np.arange(len(lengths)), lengths)
    index = np.concatenate([np.arange(length) for length in lengths])
    return Pool(source[keep], part[keep], index[keep], content[keep], split[keep], removed, forms_of_words)


def split_of(group: np.ndarray, options: BuildOptions) -> np.ndarray:
    """The number of each group hash's (uint64) split. It does not depend on the amount of data."""
    place = mixed(group, 0).astype(np.float64) / 2.0**64
    test, held_out = options.test_fraction, options.test_fraction + options.validation_fraction
    return np.select([place < test, place < held_out], [2, 1], 0)


def ngrams_of(options: BuildOptions, folder: Path) -> Path | None:
    """Write the n-grams of all evaluation sets to a file named by its content; None if there are no sets.

    Raises:
        SRDEError: an evaluation set is neither a file nor a source, or cannot be read.
    """
    if not options.decontaminate_against:
        return None
    sets = []
    for name in options.decontaminate_against:
        sets.append(evaluation_ngrams(_evaluation_texts(name, options)))
        if not len(sets[-1]):
            raise SRDEError(f"decontaminate_against={name}: holds no question. Leave it out, or give the right file.")
    found = np.unique(np.concatenate(sets))
    path = folder / f"{hashlib.sha256(found.tobytes()).hexdigest()[:32]}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(path, found)
    return path


def _evaluation_texts(name: str, options: BuildOptions) -> Iterator[str]:
    """The texts of a file, or of a `source` or `source:split` of the sources file or the registry."""
    if Path(name).exists() or glob.has_magic(name):
        yield from read_evaluation_file(name)
        return
    known = {source.name: source for source in (*load_sources(), *options.sources)}
    base, _, split = name.partition(":")
    if base not in known:
        raise SRDEError(
            f"decontaminate_against={name}: no such file or source.{nearest(base, known)} Give a file of records, or "
            "source:split with a source that --list_sources shows."
        )
    if known[base].generated:
        raise SRDEError(f"decontaminate_against={name}: a generated source has no test set. Give a file of records.")
    if split and known[base].data_files:
        raise SRDEError(
            f"decontaminate_against={name}: the source names its files (data_files), so it has no other split. Name it "
            f"as {base}, or give a file."
        )
    source = Source(**vars(known[base]) | ({"split": split} if split else {}))
    try:
        opened = open_source(source, revision=source.revision, seed=options.seed, rows=0)
    except SourceError as error:
        raise SRDEError(f"decontaminate_against={name}: cannot be read: {error}.") from None
    broken: Counter[str] = Counter()
    for row in opened.reader.examples(0, opened.reader.count):
        example = row.example if isinstance(row, HeldOutRow) else row
        if isinstance(example, Example):
            yield " ".join(message["content"] for message in example.messages if message["role"] == "user")
        else:
            broken[str(example)] += 1
    if broken:
        log.warning(
            "decontaminate_against=%s: %d of its %d rows are broken (%s), and their questions are not searched for",
            *(name, broken.total(), opened.reader.count, broken.most_common(1)[0][0]),
        )


def _matches(records: Records, ngrams: Path, store: ArtifactStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns of `find_ngrams` of all parts, with the number of the document in all of them as `index`."""
    code = code_fingerprint("srde_ds.data.build.decontaminate", "srde_ds.data.build.row_rules")
    work = [
        (fingerprint(code, made.key, ngrams.stem), {"records": made.path, "ngrams": ngrams}) for made in records.parts
    ]
    tables = [read_table(made.path) for made in store.run("decontaminate", find_ngrams, work)]
    starts = np.cumsum([0, *records.lengths])
    index = [table["index"].to_numpy() + start for table, start in zip(tables, starts, strict=False)]
    ngram, whole = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("ngram", "whole"))
    return np.concatenate(index), ngram, whole
