"""Routers made of the domains' statistics, as at the end of a run by domain, in the benchmarks' plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srde_ds.config import TrainingConfig
from srde_ds.data.loader import validation_batches
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attention import Documents
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.domain_statistics import statistics_of, sum_inputs
from srde_ds.training.reporting.held_out import forced_experts
from srde_ds.training.warm_start.from_statistics import router_of
from srde_ds.training.warm_start.token_sample import all_tokens, special_token_ids


def routers_of_domains(
    model: SRDEModel,
    rows: datasets.Dataset,
    domains: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    rows_a_domain: int = TrainingConfig.domain_statistics_rows,
    trained: bool = True,
    alike: bool = False,
) -> None:
    """Set the routers from inputs of packed rows, with each domain's expert and without: expert d is domain d's.

    Args:
        trained: whether the deltas are not all zero, so that inputs with experts are others.
        alike: all tokens weigh the same, instead of prompts' last tokens, answers and others by thirds.
    """
    special = special_token_ids(tokenizer)
    sample = all_tokens(rows, domains=domains, rows_a_domain=rows_a_domain, special_ids=special, seed=seed)
    sample = replace(sample, weight=None) if alike else sample

    def forward(batch: dict[str, Tensor]) -> None:
        documents = Documents.of(batch["position_ids"])
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")} | {"attention_mask": documents.no_mask}
        own = [RoutingPolicy(forced_experts=forced_experts(batch, "domain"))] if trained else []
        for policy in [*own, RoutingPolicy(active=False)]:
            model(**inputs, documents=documents, logits_to_keep=1, policy=policy)

    batches = validation_batches(rows.select(sample.rows), 1)
    counts = np.bincount(sample.domain, minlength=len(domains))
    with torch.no_grad():
        sums = sum_inputs(model, forward, batches, sample, len(domains))
    found = statistics_of(sums if trained else 2 * sums, counts)
    for number, (layer, statistics) in enumerate(zip(model.layers, found, strict=True)):
        layer.router.weight.data.copy_(router_of(statistics, seed=seed, layer=number))
