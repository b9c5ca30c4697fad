"""The batches that a rank sees at a step. They depend only on the step, so that resuming needs no replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from srde_ds.data.loss_weights import LossWeights
from srde_ds.data.mixing import MixingPeriod, Mixture
from srde_ds.data.packing import NO_LABEL
from srde_ds.errors import SRDEError

COLUMNS = ("input_ids", "labels", "position_ids", "domain", "length")


class RowStream:
    """The endless stream of training rows.

    Step s takes `global_batch_rows` rows, beginning at position s * global_batch_rows, whatever the number of ranks.
    Without `periods`, epochs follow one another. Each covers each row once, in an order fixed by (seed, epoch). A batch
    may span two epochs, or repeat a dataset that is smaller than the batch. With `periods`, domains take turns by their
    shares, and each has its own epochs (see `Mixture`).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        seed: int,
        global_batch_rows: int,
        periods: Sequence[MixingPeriod] | None = None,
        loss_weights: LossWeights | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise SRDEError("the dataset has no rows: build it again.")
        self.rows = _as_numpy(dataset)
        self.seed = seed
        self.global_batch_rows = global_batch_rows
        self.loss_weights = loss_weights or LossWeights()
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._drawn = lru_cache(maxsize=1)(self._draw)  # all micro-steps of a step ask for the same
        self._mixture = None
        if periods is not None:
            domain = np.asarray(self.rows["domain"][:])
            places = [np.flatnonzero(domain == number) for number in range(len(periods[0].shares))]
            self._mixture = Mixture(periods, places, seed=seed, rows_per_step=global_batch_rows)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def rows_of_step(self, step: int) -> list[int]:
        """The row indices of a whole optimizer step; `step` counts from 0."""
        return self._drawn(step)

    def _draw(self, step: int) -> list[int]:
        first = step * self.global_batch_rows
        positions = range(first, first + self.global_batch_rows)
        if self._mixture is not None:
            return [self._mixture.row(position) for position in positions]
        places = (divmod(position, len(self.rows)) for position in positions)
        return [int(self._order(epoch)[index]) for epoch, index in places]

    def epochs(self, step: int) -> list[float]:
        """The epochs of each domain's rows before `step`, or, without `periods`, one number for all rows."""
        position = step * self.global_batch_rows
        if self._mixture is None:
            return [position / len(self.rows)]
        sizes = [max(1, len(rows)) for rows in self._mixture.rows_of_domain]
        return (self._mixture.draws(position) / sizes).tolist()

    def micro_batch(self, step: int, micro: int, *, rank: int, world_size: int, batch_size: int) -> dict[str, Tensor]:
        """The rows of one rank in one micro-step.

        Returns:
            `input_ids`, `labels`, `position_ids` int64 [b, S]; `token_mask` bool [b, S], True on real tokens;
            `domain` int64 [b]; and, unless all labels count equally, `label_weights` fp32 [b, S]. There is no attention
            mask, since transformers keeps packed documents apart by `position_ids`.
        """
        micro_rows = world_size * batch_size
        if self.global_batch_rows % micro_rows or not 0 <= micro < self.global_batch_rows // micro_rows:
            raise SRDEError(
                f"micro-step {micro} of {world_size} ranks with batch_size={batch_size} does not lie in a global batch "
                f"of {self.global_batch_rows} rows."
            )
        first = micro * micro_rows + rank * batch_size
        batch = collate(self.rows, self.rows_of_step(step)[first : first + batch_size])
        weights = self.loss_weights.of_batch(batch)
        return batch if weights is None else batch | {"label_weights": weights}


def validation_batches(
    dataset: datasets.Dataset, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Each row once, in batches of which every rank gets the same number (ZeRO-3 ranks run in lockstep).

    Batches are those of `RowStream.micro_batch`, plus `row_index` int64 [b]. When rows run out, a batch is filled with
    dummy rows that have row_index -1, no label and no real token.
    """
    rows = _as_numpy(dataset)
    for start in range(0, len(rows), world_size * batch_size):
        first = start + rank * batch_size
        indices = list(range(first, min(first + batch_size, len(rows))))
        real = len(indices)
        batch = collate(rows, indices + [0] * (batch_size - real))
        batch["row_index"] = torch.tensor(indices + [-1] * (batch_size - real))
        batch["labels"][real:] = NO_LABEL
        batch["token_mask"][real:] = False
        yield batch


def collate(rows: datasets.Dataset, indices: list[int]) -> dict[str, Tensor]:
    """The rows at `indices` as tensors; see `RowStream.micro_batch`."""
    columns: dict[str, Any] = rows[indices]
    tensors = {name: torch.from_numpy(np.asarray(columns[name], dtype=np.int64)) for name in COLUMNS}
    length = tensors.pop("length")
    tensors["token_mask"] = torch.arange(tensors["input_ids"].shape[1]) < length[:, None]
    return tensors


def _as_numpy(dataset: datasets.Dataset) -> datasets.Dataset:
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise SRDEError(f"the dataset has no column '{missing[0]}': build it with build_dataset.")
    return dataset.with_format("numpy")
