"""Warns of documents that training will not see, or only in part."""

from __future__ import annotations

import logging

from srde_ds.data.manifest import DomainCounts, Manifest

log = logging.getLogger(__name__)


def warn_of_dropped(manifest: Manifest) -> None:
    """Warn of documents longer than `max_length`, by split and domain, with the remedy."""
    for name, split in manifest.splits.items():
        for domain, counts in split.domains.items():
            if counts.too_long:
                log.warning("%s, %s: %s", name, domain, _warning(counts, manifest))


def _warning(counts: DomainCounts, manifest: Manifest) -> str:
    cut = counts.too_long - counts.dropped
    what = [f"{counts.dropped:,} left out"] if counts.dropped else []
    what += [f"{cut:,} cut at their end"] if cut else []
    remedy = (
        f"raise --max_length (the longest has {counts.longest:,} tokens)" if counts.longest else "raise --max_length"
    )
    if counts.dropped and manifest.too_long == "drop":
        remedy += ", or give --too_long truncate to keep what fits"
    if counts.dropped and manifest.too_long == "truncate":
        remedy += ": those left out do not even fit with their question alone"
    return (
        f"{counts.too_long:,} of {counts.documents:,} documents are longer than max_length={manifest.max_length}: "
        f"{', '.join(what)}. To keep them whole, {remedy}."
    )
