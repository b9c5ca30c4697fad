"""From files of any known kind and form to checked records; what is wrong with them is told all at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from srde_ds.config import DataConfig
from srde_ds.data.conversation import TrainOn
from srde_ds.data.files import find_files, read_items
from srde_ds.data.forms import FORMS, Form, convert
from srde_ds.data.records import Record, parse_record
from srde_ds.errors import SRDEError

log = logging.getLogger(__name__)

BAD_RECORDS_TOLD = 20


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; each field is an option of the verbs that read files."""

    format: str | None = None
    """name of a form; None: what a record's keys tell"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """key of the form -> the file's own name for it"""
    ignore_columns: tuple[str, ...] = ()
    """keys to leave out; `*`: all that the form does not know"""
    domain: str | None = None
    """of records that name none"""
    encoding: str | None = None
    on_bad_record: str = "fail"

    @staticmethod
    def of(data: DataConfig) -> ReadOptions:
        """Those of a config.

        Raises:
            SRDEError: `columns` is not of the form KEY=NAME,KEY=NAME.
        """
        columns: dict[str, str] = {}
        for pair in data.columns.split(",") if data.columns else ():
            key, _, name = map(str.strip, pair.partition("="))
            if not key or not name or key in columns:
                raise SRDEError(
                    f"columns={data.columns}: '{pair}' is not KEY=NAME with a key that is named once. Give it like "
                    "--columns prompt=question,response=reply."
                )
            columns[key] = name
        ignored = tuple(data.ignore_columns or ())
        return ReadOptions(data.format, columns, ignored, data.domain, data.encoding, data.on_bad_record)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, of those that differ from the defaults."""
        given = asdict(self) | {"columns": dict(self.columns), "ignore_columns": list(self.ignore_columns)}
        return {key: value for key, value in given.items() if value and value != "fail"}


class BadRecords:
    """What is wrong with records, kept until all were read."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[SRDEError] = []

    def add(self, fault: SRDEError) -> None:
        """Count a fault; the first few are kept for the message."""
        self.count += 1
        if len(self._first) < BAD_RECORDS_TOLD:
            self._first.append(fault)

    def settle(self, on_bad_record: str) -> None:
        """Tell them.

        Raises:
            SRDEError: there are some, and `on_bad_record` is fail.
        """
        if not self.count:
            return
        if self.count == 1 and on_bad_record == "fail":
            raise self._first[0]
        more = self.count - len(self._first)
        lines = [*(f"  {fault}" for fault in self._first), *([f"  and {more:,} more"] if more else [])]
        if on_bad_record == "skip":
            count = "1 bad record is" if self.count == 1 else f"{self.count:,} bad records are"
            log.warning("%s left out:\n%s", count, "\n".join(lines))
            return
        remedy = "Correct them, or give --on_bad_record skip to leave them out"
        raise SRDEError(f"{self.count:,} bad records. {remedy}:\n" + "\n".join(lines))


def read_fields(
    name: str | Path, options: ReadOptions, bad: BadRecords, *, option: str, answered: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of each record of a file, a folder or a pattern, in the one form that `forms.convert` makes.

    One line for each file tells how many there are of which form.

    Args:
        bad: takes what is wrong with single records.
        option: the name of the option that `name` was given with.
        answered: False: prompts, in files of lines of text, too.

    Raises:
        SRDEError: a file cannot be read, or `options` name a form or columns that are not there.
    """
    if options.format is not None and options.format not in FORMS:
        raise SRDEError(f"format={options.format}: choose one of {', '.join(FORMS)}.")
    unseen = set(options.columns.values())
    for path in find_files(name, option):
        forms: Counter[str] = Counter()
        for place, content in read_items(path, encoding=options.encoding, prompts=not answered):
            try:
                if isinstance(content, SRDEError):
                    raise content
                if unseen:
                    unseen -= content.keys()
                form, fields = convert(_renamed(content, options, place), place, form=options.format, answered=answered)
            except SRDEError as error:
                bad.add(error)
                continue
            forms[form.title] += 1
            yield place, fields
        log.info("%s", _told(path, forms))
    if unseen:
        raise SRDEError(f"columns: no record of '{name}' has '{min(unseen)}'. Give the names that the file has.")


def _told(path: Path, forms: Counter[str]) -> str:
    """`train.json: 3 records, ShareGPT conversations`"""
    count = f"{path}: {forms.total():,} record{'s' * (forms.total() != 1)}"
    if len(forms) <= 1:
        return ", ".join([count, *forms])
    return f"{count}: {', '.join(f'{number:,} {title}' for title, number in forms.most_common())}"


def _renamed(content: dict[str, Any], options: ReadOptions, place: str) -> dict[str, Any]:
    """The record with the names that the form has, without what is ignored."""
    if not options.columns and not options.ignore_columns:
        return content
    names = {own: key for key, own in options.columns.items()}
    fields: dict[str, Any] = {}
    for own, value in content.items():
        key = names.get(own, own)
        if own in options.ignore_columns or value is None:
            continue
        if key in fields:
            raise SRDEError(
                f"{place}: columns: '{options.columns[key]}' is to be '{key}', but the record has a '{key}' of its "
                f"own: leave that out with --ignore_columns {key}."
            )
        fields[key] = value
    return _only_known(fields, options) if "*" in options.ignore_columns else fields


def _only_known(fields: dict[str, Any], options: ReadOptions) -> dict[str, Any]:
    form: Form | None = FORMS[options.format] if options.format else None
    form = form or next((one for one in FORMS.values() if one.fits(fields)), None)
    return fields if form is None else {key: value for key, value in fields.items() if key in form.known}


def read_records(
    name: str | Path,
    domains: Sequence[str],
    options: ReadOptions | None = None,
    bad: BadRecords | None = None,
    *,
    option: str = "jsonl_data",
    train_on: TrainOn = "all",
) -> Iterator[Record]:
    """The records of a file, of the files in a folder, or of those that a pattern matches.

    Args:
        domains: those that a record may belong to. If there is one only, a record need not name it.
        bad: takes what is wrong with single records; without it, they are told after the last one.
        train_on: as of `parse_record`.

    Raises:
        SRDEError: a file cannot be read; without `bad`, a bad record, unless `options` say to leave it out.
    """
    options = options or ReadOptions()
    faults = bad or BadRecords()
    for place, fields in read_fields(name, options, faults, option=option):
        if "domain" not in fields and options.domain is not None:
            fields["domain"] = options.domain
        try:
            if "domain" not in fields and len(domains) > 1:
                raise SRDEError(f"{place}: field 'domain' is missing. For records of one domain, give --domain.")
            record = parse_record(fields, place, domains, train_on)
        except SRDEError as error:
            faults.add(error)
            continue
        yield record
    if bad is None:
        faults.settle(options.on_bad_record)
