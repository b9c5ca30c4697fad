"""Reads files of any known kind and form into checked records, and reports all faults at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from srde_ds.config import DataConfig
from srde_ds.data.conversation import TrainOn
from srde_ds.data.files import find_files, read_items, splits_by_name, warn_of_test_files
from srde_ds.data.forms import FORMS, Form, convert
from srde_ds.data.records import Record, parse_record
from srde_ds.errors import SRDEError
from srde_ds.utils.escape import one_line

log = logging.getLogger(__name__)

BAD_RECORDS_TOLD = 20


@dataclass(frozen=True)
class ReadOptions:
    """How files are read. Each field is an option of the verbs that read files."""

    format: str | None = None
    """name of a form; None: identified by each record's keys"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """key of the form -> the file's own name for it"""
    ignore_columns: tuple[str, ...] = ()
    """keys to leave out; `*`: all keys that the form does not know"""
    domain: str | None = None
    """domain of records that do not name one"""
    encoding: str | None = None
    on_bad_record: str = "fail"

    @staticmethod
    def of(data: DataConfig) -> ReadOptions:
        """The reading options of a config.

        Raises:
            SRDEError: `columns` does not have the form KEY=NAME,KEY=NAME.
        """
        columns: dict[str, str] = {}
        for pair in data.columns.split(",") if data.columns else ():
            key, _, name = map(str.strip, pair.partition("="))
            if not key or not name or key in columns:
                raise SRDEError(
                    f"columns={data.columns}: '{pair}' is not KEY=NAME, or its key occurs twice. Give it like "
                    "--columns prompt=question,response=reply."
                )
            columns[key] = name
        ignored = tuple(data.ignore_columns or ())
        return ReadOptions(data.format, columns, ignored, data.domain, data.encoding, data.on_bad_record)

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, for JSON."""
        given = asdict(self) | {"columns": dict(self.columns), "ignore_columns": list(self.ignore_columns)}
        return {key: value for key, value in given.items() if value and value != "fail"}


class BadRecords:
    """The faults of records, kept until all records have been read."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[SRDEError] = []

    def add(self, fault: SRDEError) -> None:
        """Count a fault. The first few are kept for the message."""
        self.count += 1
        if len(self._first) < BAD_RECORDS_TOLD:
            self._first.append(fault)

    def report(self, on_bad_record: str) -> None:
        """Warn of the faults, or fail.

        Raises:
            SRDEError: there are faults, and `on_bad_record` is fail.
        """
        if not self.count:
            return
        if self.count == 1 and on_bad_record == "fail":
            fault = self._first[0]
            raise SRDEError(f"{fault.message} --on_bad_record skip leaves it out.", details=fault.details)
        more = self.count - len(self._first)
        faults = [*map(one_line, map(str, self._first)), *([f"and {more:,} more"] if more else [])]
        if on_bad_record == "skip":
            count = "1 bad record is" if self.count == 1 else f"{self.count:,} bad records are"
            log.warning("%s left out:\n%s", count, "\n".join(f"  {fault}" for fault in faults))
            return
        remedy = "Correct them, or give --on_bad_record skip to leave them out"
        raise SRDEError(f"{self.count:,} bad records. {remedy}:", details=faults)


def read_fields(
    name: str | Path, options: ReadOptions, bad: BadRecords, *, option: str, answered: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of each record of a file, a folder or a pattern, in the form that `forms.convert` makes.

    One line of the log for each file says how many records of which form it holds.

    Args:
        bad: collects the faults of records.
        option: the option that gave `name`, for messages.
        answered: False for prompts, which may also come as lines of text.

    Raises:
        SRDEError: a file cannot be read, or `options` name a form or columns that do not exist.
    """
    if options.format is not None and options.format not in FORMS:
        raise SRDEError(f"format={options.format}: choose one of {', '.join(FORMS)}.")
    unseen = set(options.columns.values())
    paths = find_files(name, option)
    splits = splits_by_name(paths) if answered else {}
    if option == "jsonl_data":
        warn_of_test_files(paths)
    for path in paths:
        forms: Counter[str] = Counter()
        if path in splits:
            log.info("%s: by its name, the split of its records is %s unless they name one", path, splits[path])
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
            if path in splits:
                fields.setdefault("split", splits[path])
            yield place, fields
        log.info("%s", _summary(path, forms))
    if unseen:
        raise SRDEError(f"columns: no record of '{name}' has '{min(unseen)}'. Give names that the file has.")


def _summary(path: Path, forms: Counter[str]) -> str:
    """Such as `train.json: 3 records, ShareGPT conversations`."""
    count = f"{path}: {forms.total():,} record{'s' * (forms.total() != 1)}"
    if len(forms) <= 1:
        return ", ".join([count, *forms])
    return f"{count}: {', '.join(f'{number:,} {title}' for title, number in forms.most_common())}"


def _renamed(content: dict[str, Any], options: ReadOptions, place: str) -> dict[str, Any]:
    """The record with its keys renamed as the options say, without ignored keys."""
    if not options.columns and not options.ignore_columns:
        return content
    names: dict[str, list[str]] = {}
    for key, own in options.columns.items():
        names.setdefault(own, []).append(key)
    fields: dict[str, Any] = {}
    for own, value in content.items():
        if own in options.ignore_columns or value is None:
            continue
        for key in names.get(own, [own]):
            if key in fields:
                raise SRDEError(
                    f"{place}: columns: '{options.columns[key]}' is to be '{key}', but the record already has a "
                    f"'{key}': leave that out with --ignore_columns {key}."
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
    """The records of a file, of the files in a folder, or of those that match a pattern.

    Args:
        domains: the domains that a record may name. If there is only one, a record need not name it.
        bad: collects the faults of records; without it, they are reported after the last record.
        train_on: see `parse_record`.

    Raises:
        SRDEError: a file cannot be read, or, without `bad`, a record is bad, unless `options` say to leave it out.
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
        faults.report(options.on_bad_record)


def only_held_out(records: list[Record], eval_file: str | Path, *, tell: bool = True) -> list[Record]:
    """The records whose `split` says that they are held out, or all records if none says so.

    Args:
        eval_file: the option's value, for the log.
        tell: log what is left out.
    """
    found = [record for record in records if record.split != "train"]
    if not found or len(found) == len(records):
        return records
    left_out = len(records) - len(found)
    log.log(
        logging.INFO if tell else logging.DEBUG,
        "%s: %d held-out items; left out as training items: %d",
        *(eval_file, len(found), left_out),
    )
    return found
