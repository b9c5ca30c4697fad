"""Held-out loss by domain, computed by all ranks together during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from srde_ds.data.loader import validation_batches
from srde_ds.parallel.engine import Engine
from srde_ds.parallel.topology import Topology, all_reduce_sum


class HeldOut:
    """The validation rows, a list of batches for each domain.

    Args:
        dataset: rows as written by `build_dataset`.
        domains: names in the order of the dataset's `domain` column.
    """

    def __init__(self, dataset: Any, domains: list[str], batch_size: int, topology: Topology) -> None:
        self.topology = topology
        column = dataset.with_format("numpy")["domain"][:]
        self.rows = {name: dataset.select((column == index).nonzero()[0]) for index, name in enumerate(domains)}
        self.rows = {name: rows for name, rows in self.rows.items() if len(rows)}
        self.batch_size = batch_size

    def losses(self, engine: Engine, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Mean cross entropy of the response tokens by domain, or None when `interrupted` became true.

        Every rank runs the same number of batches: under ZeRO-3 a forward is a collective.
        """
        engine.deepspeed.eval()
        try:
            return self._losses(engine, interrupted)
        finally:
            engine.deepspeed.train()

    def _losses(self, engine: Engine, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        result = {}
        with torch.no_grad():
            for name, rows in self.rows.items():
                sums = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
                for batch in validation_batches(
                    rows, self.batch_size, rank=self.topology.rank, world_size=self.topology.world_size
                ):
                    if interrupted():
                        return None
                    batch = {key: value.to(self.topology.device) for key, value in batch.items()}
                    sums += torch.stack([value.double() for value in engine.forward(batch)])
                total, count = all_reduce_sum(sums).tolist()
                result[name] = total / count
        return result
