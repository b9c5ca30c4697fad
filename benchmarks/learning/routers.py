"""Routers as the warm start makes them, in the benchmarks' plain loops."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import datasets
import torch
from torch import Tensor

from srde_ds.data.loader import validation_batches
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attention import Documents
from srde_ds.training.warm_start.clustering import fit_router
from srde_ds.training.warm_start.routers import capture_inputs
from srde_ds.training.warm_start.token_sample import choose_tokens

SAMPLES = 512
"""of each domain, the default of `warm_start_samples`"""


def warm_start_routers(
    model: SRDEModel, rows: datasets.Dataset, domains: Sequence[str], *, special_ids: Collection[int], seed: int
) -> None:
    """Set the routers from inputs of packed rows: expert d belongs to domain d."""
    sample = choose_tokens(rows, domains=domains, per_domain=SAMPLES, special_ids=special_ids, seed=seed)

    def forward(batch: dict[str, Tensor]) -> None:
        documents = Documents.of(batch["position_ids"])
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")} | {"attention_mask": documents.no_mask}
        with torch.no_grad():
            model(**inputs, documents=documents, logits_to_keep=1)

    inputs = capture_inputs(model, forward, validation_batches(rows.select(sample.rows), 1), sample)
    for layer, x_ND in zip(model.layers, inputs, strict=True):
        points = x_ND.float().numpy()
        experts, number = len(domains), layer.layer
        fit = fit_router(points, sample.domain, num_experts=experts, method="discriminant", seed=seed, layer=number)
        layer.router.weight.data.copy_(torch.from_numpy(fit.weights))
