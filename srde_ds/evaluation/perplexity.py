"""Cross entropy of the response tokens, item by item, labelled as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import NO_LABEL, pad_token_id, tokenize
from srde_ds.data.records import Record
from srde_ds.errors import SRDEError
from srde_ds.inference.batches import batches_by_length
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.head import token_losses
from srde_ds.model.policy import RoutingPolicy, of_all_layers
from srde_ds.model.prompt_routing import routed_by_prompt
from srde_ds.model.targets import Targets


@dataclass
class ItemLoss:
    """The cross entropy of one item in nats, summed over its `tokens` response tokens, and, if requested, how often its
    tokens (prompt and response) used each expert, [L, E]."""

    loss_sum: float
    tokens: int
    assignments: Tensor | None


def response_losses(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_length: int,
    batch_size: int,
    count_experts: bool = False,
    expert: int | None = None,
    title: str = "loss",
) -> list[ItemLoss]:
    """The losses of `records`, in order. Batches are sorted by length and padded on the right.

    Args:
        expert: the expert that every token uses, with weight 1; default: the router decides, or with `model.route_by`
            "prompt" the prompt.

    Raises:
        SRDEError: an item is longer than `max_length` tokens.
    """
    if not records:
        return []
    documents = tokenize(records, tokenizer)
    for document in documents:
        if len(document) > max_length:
            raise SRDEError(
                f"{document.where}: {len(document)} tokens exceed {max_length}, the base's context: shorten or remove "
                "the item."
            )
    labelled = [torch.from_numpy(document.is_response) for document in documents]
    device, pad = model.base.device, pad_token_id(tokenizer)
    losses: dict[int, ItemLoss] = {}
    for batch in batches_by_length([len(document) for document in documents], batch_size, title):
        ids = [torch.from_numpy(documents[i].input_ids).long() for i in batch]
        labels = [row.masked_fill(~labelled[i], NO_LABEL) for i, row in zip(batch, ids, strict=True)]
        mask_BS = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
        ids_BS = pad_sequence(ids, batch_first=True, padding_value=pad).to(device)
        labels_BS = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL).to(device)
        choices: dict[int, Tensor] | None = {} if count_experts else None
        forced_BS = None if expert is None else torch.full_like(ids_BS, expert)
        policy = RoutingPolicy(forced_experts=forced_BS)
        # Up to the first label; where several answers count, the later ones are no part of the prompt.
        prompt_BS = mask_BS.bool() & ((labels_BS != NO_LABEL).cumsum(1) == 0)
        policy = replace(routed_by_prompt(model, ids_BS, prompt_BS, policy, attention_mask=mask_BS), choices=choices)
        with torch.inference_mode():
            sums_B, counts_B = _losses(model, policy, ids_BS, mask_BS, labels_BS)
        assignments: Sequence[Tensor | None] = [None] * len(batch)
        if choices is not None:
            assignments = _assignments(choices, len(model.expert_names), mask_BS.bool())
        for index, loss_sum, count, experts in zip(batch, sums_B.tolist(), counts_B.tolist(), assignments, strict=True):
            losses[index] = ItemLoss(loss_sum, count, experts)
    return [losses[index] for index in range(len(documents))]


def _losses(
    model: SRDEModel, policy: RoutingPolicy, ids_BS: Tensor, mask_BS: Tensor, labels_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's summed cross entropy and label count. Only positions with a label in some row go through the head."""
    targets = Targets.of(labels_BS)

    def forward() -> Tensor:
        logits = model(ids_BS, attention_mask=mask_BS, policy=policy, logits_to_keep=targets.columns).logits
        assert logits is not None
        return logits

    losses_BN = token_losses(model.base, forward, targets.tokens, plain=model.has_plain_head)
    return losses_BN.sum(1, dtype=torch.float64), (targets.tokens != NO_LABEL).sum(1)


def _assignments(choices: dict[int, Tensor], experts: int, mask_BS: Tensor) -> list[Tensor]:
    """[L, E] for each row of a forward: how often its real tokens used each expert in each layer."""
    rows = mask_BS.shape[0]
    choices_LTK = of_all_layers(choices)
    choices_LBSK = choices_LTK.view(len(choices_LTK), *mask_BS.shape, -1)
    used_LBSK = (choices_LBSK >= 0) & mask_BS[None, :, :, None]
    row_L, row_B = (torch.arange(n, device=mask_BS.device) for n in (len(choices_LTK), rows))
    place_LB = (row_L[:, None] * rows + row_B) * experts
    flat = (place_LB[:, :, None, None] + choices_LBSK)[used_LBSK]
    counts = torch.bincount(flat, minlength=len(choices_LTK) * rows * experts)
    return list(counts.view(len(choices_LTK), rows, experts).transpose(0, 1).cpu())
