"""The sources of each domain, from registry.yaml or a user's sources file of the same form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from srde_ds.data.sources.formatters import FORMATTERS
from srde_ds.errors import SRDEError, nearest
from srde_ds.utils.tables import aligned_table
from srde_ds.utils.yaml_files import read_yaml

REGISTRY = Path(__file__).with_name("registry.yaml")
KINDS = ("hub", "folder", "jsonl", "parquet", "reasoning_gym", "tasks")
"""Keys of which exactly one says where a source's rows come from."""
GENERATED = ("reasoning_gym", "tasks")
"""Kinds without columns, which can make more rows when a domain runs short."""
KINDS_OF_KEY = {
    "config": ("hub",),
    "revision": ("hub",),
    "data_files": ("hub",),
    "split": ("hub", "folder"),
    "columns": ("hub", "folder", "jsonl", "parquet"),
    "ignore_columns": ("hub", "folder", "jsonl", "parquet"),
    "encoding": ("jsonl",),
    "options": ("reasoning_gym",),
}
"""Keys that only some kinds have"""


@dataclass(frozen=True)
class Source:
    """An entry of a sources file; the fields are its keys."""

    name: str
    domain: str
    hub: str | None = None
    """Hub id"""
    folder: str | None = None
    """made by `save_to_disk`"""
    jsonl: str | None = None
    parquet: str | None = None
    """path of the file, which may contain wildcards"""
    reasoning_gym: str | None = None
    """name of a reasoning-gym task"""
    tasks: str | None = None
    """a domain of srde_ds.data.synthetic.tasks"""
    config: str | None = None
    split: str = "train"
    """split of a `hub` source, or of a `folder` that holds several"""
    revision: str | None = None
    """commit of the Hub"""
    data_files: str | None = None
    """files inside the Hub's repository, instead of those of `config` and `split`"""
    formatter: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """formatter's column -> the source's column, if they differ"""
    ignore_columns: list[str] = field(default_factory=list)
    """the source's columns to leave out, which `by_keys` would not know"""
    encoding: str | None = None
    """encoding of the text; None: as the byte order mark says, else UTF-8"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of a reasoning-gym task"""
    license: str = "unknown"
    redistributable: str = "unknown"
    rows: int | None = None
    """number of rows, if known beforehand; for a generated source, the most to make"""
    weight: float = 1.0
    """share of the domain's examples; 0: used only if the other sources have too few"""
    near_duplicates: bool = True
    """whether near duplicates of its rows are removed"""

    @property
    def kind(self) -> str:
        """The one of `KINDS` that is given, which says where the rows come from."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def location(self) -> str:
        """The value of `hub`, `folder`, ..."""
        return str(getattr(self, self.kind))

    @property
    def generated(self) -> bool:
        """Whether its rows are made here, in any number."""
        return self.kind in GENERATED

    def real_columns(self) -> list[str]:
        """The source's names of the columns that its formatter needs."""
        needed = FORMATTERS[self.formatter].columns if self.formatter else ()
        return [self.columns.get(column, column) for column in needed]

    def read_columns(self, present: Sequence[str]) -> list[str]:
        """Those of its columns that are read: all, if the formatter goes by a row's keys."""
        read = FORMATTERS[str(self.formatter)]
        names = {self.columns.get(column, column) for column in (*read.columns, *read.optional)}
        present = [column for column in present if column not in self.ignore_columns]
        return [column for column in present if column in names or self.formatter == "by_keys"]

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row under the formatter's names. What has another name here is not also an optional column of its own."""
        needed = FORMATTERS[str(self.formatter)].columns
        moved = set(self.columns.values()).difference(self.columns, needed).union(self.ignore_columns)
        kept = {column: value for column, value in row.items() if column not in moved}
        return kept | {column: row.get(own) for column, own in self.columns.items()}


def load_sources(path: str | Path | None = None) -> list[Source]:
    """Load the sources of a file, or those of the registry.

    The file maps each domain to a list; an entry is the name of a source of the registry or a mapping with the
    fields of `Source`. The order of the domains is that of the experts.

    Raises:
        SRDEError: the file cannot be read, or an entry is not a source. The message names file, domain and entry.
    """
    entries = _read(REGISTRY)
    if path is None:
        return _parse(entries, REGISTRY, {})
    known = {source.name: source for source in _parse(entries, REGISTRY, {})}
    return _parse(_read(Path(path)), Path(path), known)


def choose_domains(sources: Sequence[Source], domains: Sequence[str] | None) -> list[Source]:
    """The sources of `domains`, in this order; None: all of them."""
    if domains is None:
        return list(sources)
    known = list(dict.fromkeys(source.domain for source in sources))
    for domain in domains:
        if domain not in known:
            raise SRDEError(f"domains={','.join(domains)}: no source of '{domain}'.{nearest(domain, known)}")
    return [source for domain in domains for source in sources if source.domain == domain]


def print_sources(sources: Sequence[Source]) -> None:
    """Print a table with the domain, place, size, licence and columns of each source."""
    table = [["source", "domain", "from", "rows", "licence", "redistributable", "columns"]]
    for source in sources:
        place = ":".join(filter(None, [source.location, source.config]))
        commit = f"@{source.revision[:7]}" if source.revision else ""
        rows = f"{source.rows:,}" if source.rows else "as needed" if source.generated else "?"
        columns = ", ".join(source.real_columns()) or "-"
        origin = f"{source.kind} {place}{commit}"
        table.append([source.name, source.domain, origin, rows, source.license, source.redistributable, columns])
    print(aligned_table(table))


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, f"sources_file={path}")
    if not isinstance(content, dict) or not content:
        raise SRDEError(f"sources_file={path}: must map each domain to a list of sources.")
    return content


def _parse(content: Mapping[str, Any], path: Path, known: Mapping[str, Source]) -> list[Source]:
    sources: list[Source] = []
    for domain, entries in content.items():
        if not isinstance(domain, str) or not isinstance(entries, list) or not entries:
            raise SRDEError(f"sources_file={path}: '{domain}' must be a domain's name with a list of sources.")
        for entry in entries:
            source = _entry(entry, domain, path, known)
            if source.name in {other.name for other in sources}:
                raise SRDEError(f"sources_file={path}: source '{source.name}' occurs twice: rename one.")
            sources.append(source)
        if not any(source.weight for source in sources if source.domain == domain):
            raise SRDEError(f"sources_file={path}: all sources of '{domain}' have weight 0: give one a weight.")
    return sources


def _entry(entry: Any, domain: str, path: Path, known: Mapping[str, Source]) -> Source:
    if isinstance(entry, str):
        if entry not in known:
            raise SRDEError(f"sources_file={path}: no source '{entry}' in the registry.{nearest(entry, known)}")
        return Source(**vars(known[entry]) | {"domain": domain})
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise SRDEError(f"sources_file={path}: an entry of '{domain}' needs a name, or must be one.")
    place = f"sources_file={path}: source '{entry['name']}'"
    allowed = {f.name: str(f.type) for f in fields(Source) if f.name != "domain"}
    for key, value in entry.items():
        if key not in allowed:
            raise SRDEError(f"{place}: unknown key '{key}'.{nearest(str(key), allowed)}")
        if not _fits(value, allowed[key]):
            raise SRDEError(
                f"{place}: {key}={value!r} must be of type {allowed[key].partition('[')[0].split(' |')[0]}."
            )
    kinds = [kind for kind in KINDS if entry.get(kind) is not None]
    if len(kinds) != 1:
        raise SRDEError(f"{place}: needs exactly one of {', '.join(KINDS)}, has {', '.join(kinds) or 'none'}.")
    source = Source(domain=domain, **entry)
    if source.redistributable not in ("yes", "no", "unknown"):
        raise SRDEError(f'{place}: redistributable={source.redistributable!r}: must be "yes", "no" or unknown.')
    if not 0 <= source.weight < math.inf:  # refuses nan as well
        raise SRDEError(f"{place}: weight={source.weight}: must be finite, and must not be negative.")
    if source.generated == (source.formatter is not None):
        has = "makes conversations by itself: leave formatter out" if source.generated else "needs a formatter"
        raise SRDEError(f"{place}: {has}.")
    if source.formatter and source.formatter not in FORMATTERS:
        raise SRDEError(f"{place}: unknown formatter '{source.formatter}'.{nearest(source.formatter, FORMATTERS)}")
    if "split" in entry and source.data_files:
        raise SRDEError(f"{place}: split={source.split} with data_files, which are read whole: leave split out.")
    for key, of in KINDS_OF_KEY.items():
        if key in entry and source.kind not in of:
            raise SRDEError(f"{place}: {key} is only for {', '.join(of)}: leave it out.")
    for column, own in source.columns.items():
        read = FORMATTERS[str(source.formatter)]
        if column not in (*read.columns, *read.optional) and source.formatter != "by_keys":
            known_columns = (*read.columns, *read.optional)
            raise SRDEError(
                f"{place}: columns: the formatter {source.formatter} does not read '{column}', but "
                f"{', '.join(known_columns)}.{nearest(str(column), known_columns)}"
            )
        if not isinstance(own, str):
            raise SRDEError(f"{place}: columns: {column}={own!r} must be the name of a column.")
    for own in source.ignore_columns:
        if not isinstance(own, str) or own == "*":
            raise SRDEError(
                f"{place}: ignore_columns: {own!r} must be the name of a column. Name each one to leave out."
            )
        if own in source.columns.values():
            raise SRDEError(f"{place}: ignore_columns: columns reads '{own}'. Name it in one of them.")
    return source


def _fits(value: Any, annotation: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "dict": (dict,),
        "list": (list,),
    }  # fmt: skip
    if value is None:
        return "None" in annotation
    if isinstance(value, bool):
        return annotation == "bool"
    return isinstance(value, kinds[annotation.partition("[")[0].partition(" ")[0]])
