"""Opens the sources of a build: skips missing ones, remembers their commits, and grows generated ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from srde_ds.data.build.options import BuildOptions
from srde_ds.data.sources.reading import OpenSource, generator_version, open_source
from srde_ds.data.sources.registry import Source
from srde_ds.errors import SRDEError
from srde_ds.utils.files import write_text
from srde_ds.utils.retry import SourceError

log = logging.getLogger(__name__)

LOCK = "sources.lock.json"
GENERATED_AT_ONCE = 1000
"""rows in a part of a generated source, which grows part by part"""
WORTHWHILE = 0.1
"""a generated source is exhausted when the share of new rows falls below this"""


def _read_lock(path: Path) -> dict[str, str]:
    """The commits, by Hub id."""
    try:
        lock = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError):
        lock = None
    if not isinstance(lock, dict):
        raise SRDEError(f"'{path}' is damaged: delete it. Commits that no source pins are then looked up again.")
    return lock


class Supply:
    """The open sources by name, in the order of the sources file, which decides which duplicate is kept."""

    def __init__(self, options: BuildOptions, work_dir: Path) -> None:
        self.options = options
        self.opened: dict[str, OpenSource] = {}
        self.skipped: dict[str, str] = {}
        """sources that could not be read, and why"""
        self._sizes: dict[str, int] = {}
        self._exhausted: set[str] = set()
        self._open_all(work_dir / LOCK)

    @property
    def sources(self) -> list[Source]:
        """The entries of the sources file."""
        return [opened.source for opened in self.opened.values()]

    def _open_all(self, path: Path) -> None:
        """Download or find every source, but generated ones that only fill gaps not before there is a gap.

        Commits that are looked up are kept in a file, so that a resumed build uses the same ones.
        """
        lock = _read_lock(path)
        self._warn_of_missing_packages()
        for source in self.options.sources:
            if source.generated:
                weights = sum(other.weight for other in self.options.sources if other.domain == source.domain)
                self._sizes[source.name] = 0
                if not source.weight:
                    continue
                self._sizes[source.name] = max(1, int(self.options.examples_per_domain * source.weight / weights))
            self._open(source, lock.get(source.location))
        looked_up = [one for one in self.opened.values() if one.source.kind == "hub" and not one.source.revision]
        lock |= {one.source.location: one.revision for one in looked_up}
        write_text(path, json.dumps(lock, indent=2) + "\n")
        for domain in self.options.domains:
            if not any(opened.source.domain == domain for opened in self.opened.values()):
                self._open_fillers(domain)
            if not self._of(domain):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
                raise SRDEError(f"domain '{domain}' has no source left ({reasons}): give it another one.")

    def _of(self, domain: str) -> list[Source]:
        return [s for s in self.options.sources if s.domain == domain and s.name not in self.skipped]

    def _open(self, source: Source, revision: str | None) -> None:
        size = -(-self._sizes.get(source.name, 0) // GENERATED_AT_ONCE) * GENERATED_AT_ONCE
        try:
            opened = open_source(source, revision=source.revision or revision, seed=self.options.seed, rows=size)
        except SourceError as error:
            self._skip(source, error)
            return
        self.opened[source.name] = opened
        order = [s.name for s in self.options.sources]
        self.opened = dict(sorted(self.opened.items(), key=lambda item: order.index(item[0])))

    def _open_fillers(self, domain: str) -> None:
        """Have the sources that only fill gaps make all of a domain, because its others could not be read."""
        fillers = self._of(domain)
        for source in fillers:
            self._sizes[source.name] = -(-self.options.examples_per_domain // len(fillers))
            self._open(source, None)

    def _warn_of_missing_packages(self) -> None:
        """Tell beforehand what a domain that falls short would need, since the gap shows late in a build."""
        domains: dict[str, list[str]] = {}
        for source in self.options.sources:
            if source.generated and not source.weight:
                try:
                    generator_version(source)
                except SourceError as error:
                    domains.setdefault(str(error), []).append(source.domain)
        for missing, of in domains.items():
            log.warning("would be needed if domain %s falls short: %s", " or ".join(dict.fromkeys(of)), missing)

    def _skip(self, source: Source, error: SourceError) -> None:
        if self.options.on_missing_source == "fail":
            raise SRDEError(
                f"source '{source.name}' ({source.kind} {source.location}) cannot be read: {error}. "
                "Correct it, or give --on_missing_source skip to have the domain's other sources make up for it."
            ) from None
        log.warning("source %s is skipped: %s", source.name, error)
        self.skipped[source.name] = str(error)

    def grow(self, missing: dict[str, int], found: dict[str, int]) -> bool:
        """Have generated sources make what the domains lack.

        Args:
            missing: number of missing documents, by domain.
            found: number of documents that cleaning has kept, by source.

        Returns:
            False if nothing is missing or no source can make more.
        """
        grown = False
        for domain, lack in missing.items():
            able = [s for s in self._of(domain) if s.generated and s.name not in self._exhausted]
            for source in able if lack > 0 else []:
                grown |= self._grow(source, -(-lack // len(able)), found.get(source.name, 0))
        return grown

    def _grow(self, source: Source, missing: int, found: int) -> bool:
        before = self._sizes[source.name]
        made = self.opened[source.name].reader.count if source.name in self.opened else 0
        rate = found / made if made else 1.0
        wanted = before + int(1.1 * missing / max(rate, WORTHWHILE)) + GENERATED_AT_ONCE
        self._sizes[source.name] = min(wanted, source.rows or wanted)
        if rate < WORTHWHILE or self._sizes[source.name] == before:
            self._exhausted.add(source.name)
            return False
        self._open(source, None)
        return source.name not in self.skipped
