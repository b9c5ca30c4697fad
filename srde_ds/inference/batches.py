"""Batches of items of similar length, to keep padding small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from srde_ds.utils.launcher import launched_rank

MAX_TOKENS = 16384


def batches_by_length(lengths: Sequence[int], batch_size: int, title: str) -> Iterator[list[int]]:
    """Indices into `lengths`, longest first, so that a lack of memory shows at once; with a progress bar on a terminal.

    A batch holds at most `batch_size` items and, padded, at most MAX_TOKENS tokens (or one longer item), so that a few
    long documents do not limit the batch size for all.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    hidden = True if launched_rank() else None  # None: shown on a terminal
    with tqdm(total=len(order), desc=title, unit="item", disable=hidden, leave=False) as bar:
        while order:
            count = max(1, min(batch_size, MAX_TOKENS // lengths[order[0]]))
            batch, order = order[:count], order[count:]
            yield batch
            bar.update(len(batch))
