"""Finds exact and near duplicates across all sources; the first of several similar documents is kept.

Near duplicates are found by MinHash: documents that share all hashes of a band of their signatures are compared, and
the later one is removed if their Jaccard similarity, over runs of five words, reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srde_ds.data.build.row_rules import NUM_PERM
from srde_ds.data.build.tables import read_table

WIDTHS = (8, 4, 2, 1)
"""hashes in a band; narrower ones find less similar pairs, and compare more"""
FOUND = 0.9
"""least probability with which a pair just as similar as the threshold is compared; at 0.8 it is 0.95"""
MOST_LEADERS = 64
"""documents in a bucket that the others are compared with; bounds the work when a form letter fills a bucket"""
_CHUNK = 65_536


def exact_duplicates(content: np.ndarray) -> np.ndarray:
    """bool [N]: whether an earlier document has the same `content` hash."""
    repeated = np.ones(len(content), bool)
    repeated[np.unique(content, return_index=True)[1]] = False
    return repeated


def near_duplicates(signatures: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    """bool [N]: whether a document is similar to an earlier one.

    Args:
        signatures: uint32 [N, NUM_PERM]; may be memory-mapped.
        candidates: bool [N], the documents to consider.
        threshold: estimated Jaccard similarity from which two documents are duplicates.
    """
    removed = np.zeros(len(signatures), bool)
    width = next(width for width in WIDTHS if _compared(threshold, width) >= FOUND or width == WIDTHS[-1])
    for band in range(NUM_PERM // width):
        members = np.flatnonzero(candidates & ~removed)
        _remove_in_band(signatures, members, slice(band * width, (band + 1) * width), threshold, removed)
    return removed


def _compared(similarity: float, width: int) -> float:
    """The probability that a pair shares a band."""
    return float(1 - (1 - similarity**width) ** (NUM_PERM // width))


def _remove_in_band(
    signatures: np.ndarray, members: np.ndarray, band: slice, threshold: float, removed: np.ndarray
) -> None:
    keys = np.empty(len(members), np.uint64)
    for start in range(0, len(members), _CHUNK):
        keys[start : start + _CHUNK] = _band_keys(signatures[members[start : start + _CHUNK], band])
    order = np.argsort(keys, kind="stable")  # keeps the documents' order within a bucket
    members, keys = members[order], keys[order]
    for _ in range(MOST_LEADERS):
        bucket = np.cumsum(np.r_[True, keys[1:] != keys[:-1]]) - 1 if len(keys) else np.empty(0, int)
        sizes = np.bincount(bucket)
        crowded = sizes[bucket] > 1 if len(keys) else np.empty(0, bool)
        members, keys = members[crowded], keys[crowded]
        if not len(members):
            return
        first = np.r_[True, keys[1:] != keys[:-1]]
        leaders = members[first][np.cumsum(first) - 1]
        followers = ~first
        alike = np.zeros(len(members), bool)
        alike[followers] = _similarity(signatures, leaders[followers], members[followers]) >= threshold
        removed[members[alike]] = True
        members, keys = members[~first & ~alike], keys[~first & ~alike]


def _band_keys(values: np.ndarray) -> np.ndarray:
    """Hash uint32 [n, width] to uint64 [n]."""
    keys = np.zeros(len(values), np.uint64)
    for column in values.T:
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _similarity(signatures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of pairs: the share of equal hashes."""
    result = np.empty(len(left))
    for start in range(0, len(left), _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = (signatures[left[part]] == signatures[right[part]]).mean(1)
    return result


def gather_signatures(paths: Sequence[Path], lengths: Sequence[int], file: Path) -> np.ndarray:
    """Collect the signatures of all parts in one memory-mapped file, with zeros for parts that have none."""
    total = sum(lengths)
    merged = np.lib.format.open_memmap(file, "w+", np.uint32, (total, NUM_PERM))
    start = 0
    for path, length in zip(paths, lengths, strict=True):
        table = read_table(path)
        if "signature" in table.column_names and length:
            column = table["signature"].combine_chunks()
            values = np.frombuffer(column.buffers()[1], np.uint32).reshape(-1, NUM_PERM)
            merged[start : start + length] = values[:length]
        start += length
    return merged
