"""Open the sources of a build: skip those that are missing, keep their commits, grow the generated ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from srde_ds.data.build.options import BuildOptions
from srde_ds.data.sources.reading import OpenSource, open_source
from srde_ds.data.sources.registry import Source
from srde_ds.errors import SRDEError
from srde_ds.utils.files import write_text
from srde_ds.utils.retry import SourceError

log = logging.getLogger(__name__)

LOCK = "sources.lock.json"
GENERATED_AT_ONCE = 1000
"""rows that a generated source makes as one part: it grows by such parts, and keeps those it has"""
WORTHWHILE = 0.1
"""a generated source is exhausted when a smaller share of its rows than this is new"""


def _read_lock(path: Path) -> dict[str, str]:
    """Commit by Hub id."""
    try:
        lock = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        lock = None
    if not isinstance(lock, dict):
        raise SRDEError(f"'{path}' is damaged: delete it; commits that no source pins are then looked up again.")
    return lock


class Supply:
    """The open sources by name, in the order of the sources file; that order decides which duplicate is kept."""

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
        """Download or find every source; generated ones that only fill gaps wait until there is one.

        Commits that are looked up are kept in a file, so that a build that goes on uses the same.
        """
        lock = _read_lock(path)
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
            if not self._of(domain):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
                raise SRDEError(f"domain '{domain}' is left without any source ({reasons}): give it another one.")

    def _of(self, domain: str) -> list[Source]:
        return [s for s in self.options.sources if s.domain == domain and s.name not in self.skipped]

    def _open(self, source: Source, revision: str | None) -> None:
        size = -(-self._sizes.get(source.name, 0) // GENERATED_AT_ONCE) * GENERATED_AT_ONCE
        try:
            opened = open_source(source, revision=source.revision or revision, seed=self.options.seed, rows=size)
        except SourceError as error:
            if self.options.on_missing_source == "fail":
                raise SRDEError(
                    f"source '{source.name}' ({source.kind} {source.location}) cannot be read: {error}. "
                    "Correct it, or give --on_missing_source skip: the domain's other sources make up for it."
                ) from None
            log.warning("source %s is skipped: %s", source.name, error)
            self.skipped[source.name] = str(error)
            return
        self.opened[source.name] = opened
        order = [s.name for s in self.options.sources]
        self.opened = dict(sorted(self.opened.items(), key=lambda item: order.index(item[0])))

    def grow(self, missing: dict[str, int], found: dict[str, int]) -> bool:
        """Let generated sources make what the domains lack.

        Args:
            missing: documents, by domain.
            found: documents that cleaning left, by source.

        Returns:
            False when nothing is missing or no source can make more.
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
