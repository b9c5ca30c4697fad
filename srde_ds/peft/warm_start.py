"""Routers of a model of PEFT that know the domains before training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from srde_ds.config import CurriculumConfig
from srde_ds.data.loader import validation_batches
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.reporting.held_out import Batch
from srde_ds.training.warm_start.clustering import Method, fit_router
from srde_ds.training.warm_start.routers import capture_inputs
from srde_ds.training.warm_start.token_sample import choose_tokens, special_token_ids

BATCH_SIZE = 8
DEFAULTS = CurriculumConfig()


def warm_start_routers(
    model: Any,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Method = DEFAULTS.warm_start_method,
    samples: int = DEFAULTS.warm_start_samples,
    seed: int = 0,
) -> list[float]:
    """Set the routers of the active adapter, so that each expert gets the tokens of its domain.

    On several processes each one runs all rows, and takes the result of the first.

    Args:
        model: of PEFT, with the experts of `srde_ds.peft`.
        rows: `input_ids`, and `domain`: the name of the expert that the row belongs to, or its number. Some thousand
            are enough.
        tokenizer: says which tokens are special, which are left out.
        method, samples: as the options `warm_start_method` and `warm_start_samples` of a run.

    Returns:
        `[L]` the share of the sampled tokens whose best expert is that of their domain.

    Raises:
        SRDEError: a column is missing, a domain names no expert or has no usable tokens, or what enters the routers
            does not tell the experts apart.
    """
    view = model.srde_model()
    padded, domains = padded_rows(rows, view.expert_names, "warm_start")
    special = special_token_ids(tokenizer)
    sample = choose_tokens(padded, domains=domains, per_domain=samples, special_ids=special, seed=seed)
    with evaluated(model):
        batches = validation_batches(padded.select(sample.rows), BATCH_SIZE)
        inputs = capture_inputs(view, forward_of(view), batches, sample)
    shares = []
    for number, layer in enumerate(view.layers):
        found = fit_router(
            inputs[number].float().numpy(),
            sample.domain,
            num_experts=view.config.num_experts,
            method=method,
            seed=seed,
            layer=number,
        )
        layer.router.weight.data.copy_(torch.from_numpy(found.weights))
        if dist.is_initialized():
            dist.broadcast(layer.router.weight.data, src=0)
        shares.append(found.own_domain_share)
    return shares


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """Inside this context the model is in eval mode, and there are no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def forward_of(view: SRDEModel) -> Callable[[Batch], object]:
    """A forward of rows as of `validation_batches`, without logits."""
    device = view.layers[0].router.weight.device

    def forward(batch: Batch) -> None:
        inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids", "token_mask")}
        view(**inputs, logits_to_keep=1, policy=RoutingPolicy())

    return forward


def padded_rows(rows: datasets.Dataset, experts: list[str], option: str) -> tuple[datasets.Dataset, list[str]]:
    """The rows as those of `build_dataset`, one document each, and their domains: the first ones of the experts.

    Args:
        option: what the rows were given as, for messages.
    """
    for column in ("input_ids", "domain"):
        if column not in rows.column_names:
            raise SRDEError(
                f"{option}: the rows have no column '{column}'. Give tokenized rows with the domain of each, such as "
                "the train_dataset of an SFTTrainer that does not pack."
            )
    column = rows["domain"][:]
    known = {name: number for number, name in enumerate(experts)} | dict(enumerate(range(len(experts))))
    for domain in column:
        if domain not in known:
            raise SRDEError(
                f"{option}: domain '{domain}': no expert has this name; they are {', '.join(experts)}. Give "
                "SRDEConfig the domains as expert_names."
            )
    numbers = [known[domain] for domain in column]
    ids = rows["input_ids"][:]
    lengths = [len(row) for row in ids]
    longest = max(lengths, default=0)
    position = np.arange(longest)
    table = np.zeros((len(ids), longest), np.int64)
    for row, own in zip(table, ids, strict=True):
        row[: len(own)] = own
    columns = {
        "input_ids": table,
        "labels": table,
        "position_ids": np.broadcast_to(position, table.shape),
        "domain": np.asarray(numbers, np.int64),
        "length": np.asarray(lengths, np.int64),
    }
    return datasets.Dataset.from_dict(columns), experts[: max(numbers, default=-1) + 1]
