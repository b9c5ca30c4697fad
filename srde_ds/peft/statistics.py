"""Statistics of the layers' inputs on each domain in a PEFT model, for `srde-ds combine`."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.config import TrainingConfig
from srde_ds.data.loader import validation_batches
from srde_ds.errors import SRDEError
from srde_ds.model.evaluated import evaluated
from srde_ds.model.policy import RoutingPolicy
from srde_ds.peft.warm_start import BATCH_SIZE, padded_rows
from srde_ds.training.domain_statistics import statistics_of, sum_inputs
from srde_ds.training.warm_start.routers import forward_of
from srde_ds.training.warm_start.token_sample import all_tokens, special_token_ids

DEFAULTS = TrainingConfig()


def measure_domains(
    model: Any,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows_a_domain: int = DEFAULTS.domain_statistics_rows,
    seed: int = 0,
) -> dict[str, int]:
    """Measure the statistics of each block's inputs on each domain, and store them in the active adapter.

    `save_pretrained` saves them, and `srde-ds combine` makes routers from them. With several processes, each one runs
    all rows.

    Args:
        model: a trained PEFT model with the experts of `srde_ds.peft`.
        rows: rows like those of `warm_start_routers`, and what tells answers from prompts, see `padded_rows`.
        tokenizer: tells which tokens are special; these are left out.
        rows_a_domain: number of rows per domain to run.

    Returns:
        The number of tokens measured, by domain.

    Raises:
        SRDEError: a column is missing, a domain names no expert, or no row has a usable token.
    """
    view = model.srde_model()
    padded, domains = padded_rows(rows, view.expert_names, "domain_statistics", most=rows_a_domain, seed=seed)
    special = special_token_ids(tokenizer)
    sample = all_tokens(padded, domains=domains, rows_a_domain=rows_a_domain, special_ids=special, seed=seed)
    counts = np.bincount(sample.domain, minlength=len(domains))
    if not counts.any():
        raise SRDEError(
            "domain_statistics: all tokens are special or in beginnings that several domains share. Give other rows."
        )
    policies = [RoutingPolicy(), RoutingPolicy(active=False)]
    with evaluated(model):
        batches = validation_batches(padded.select(sample.rows), BATCH_SIZE)
        sums = sum_inputs(view, forward_of(view, lambda _: policies), batches, sample, len(domains))
    tokens = {name: int(count) for name, count in zip(domains, counts, strict=True) if count}
    model.base_model.set_domain_statistics(view.adapter, tokens, statistics_of(sums, counts))
    return tokens
