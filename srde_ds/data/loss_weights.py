"""How much each label counts in the loss, relative to the others of its optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from srde_ds.data.manifest import Split
from srde_ds.data.packing import NO_LABEL

Weighting = Literal["token", "document", "domain"]


@dataclass(frozen=True)
class LossWeights:
    """Makes the weights of a batch's labels. The loss of a step is the weighted mean over all its labels.

    Weights depend only on a row and the dataset, so the loss does not depend on how a step's rows are divided among
    ranks and micro-steps.

    Attributes:
        weighting: what counts equally: each token, each document or each domain.
        of_domain: with `domain`, the weight of a label of each domain.
    """

    weighting: Weighting = "token"
    of_domain: tuple[float, ...] = ()

    @staticmethod
    def of(weighting: Weighting, train: Split, *, mixed: bool) -> LossWeights:
        """The weights for a dataset.

        Args:
            train: counts of the training rows, in the order of the rows' column `domain`.
            mixed: whether the user has set the domains' shares of rows, which are then also their shares of the loss.
        """
        if weighting != "domain":
            return LossWeights(weighting)
        counts = [count for count in train.domains.values() if count.response_tokens]
        mean = sum(count.response_tokens for count in counts) / (sum(c.rows for c in counts) if mixed else len(counts))
        return LossWeights(
            weighting,
            tuple(
                mean * (count.rows if mixed else 1) / count.response_tokens if count.response_tokens else 0.0
                for count in train.domains.values()
            ),
        )

    def of_batch(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The labels' weights, fp32 [B, S], 0 where there is no label; None if all labels count equally."""
        if self.weighting == "token":
            return None
        counted = (batch["labels"] != NO_LABEL).float()
        if self.weighting == "domain":
            return counted * torch.tensor(self.of_domain)[batch["domain"], None]
        document = (batch["position_ids"] == 0).cumsum(1)
        labels = torch.zeros(counted.shape[0], counted.shape[1] + 1).scatter_add(1, document, counted)
        return counted / labels.gather(1, document).clamp(min=1)
