"""Routes all tokens of a text by its prompt: to the expert that the prompt's tokens choose most often.

Token by token, some go to experts of other domains. Above all the first ones: a template's beginning is the same in all
domains, and attention leans on a text's first token throughout. For experts that were trained apart on their domains,
one expert for a whole text is what they were trained with.

The votes of the prompt's last token are counted once more for each of its tokens, so that it decides where its layers
agree. It alone has read the whole prompt, and domains may differ only in what the last sentence asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.model.policy import PolicyControl, RoutingPolicy, of_all_layers


class RoutedModel(Protocol):
    """What is needed of `adapter.SRDEModel`."""

    expert_names: list[str]
    routing: PolicyControl
    route_by: Any
    __call__: Callable[..., Any]


def votes_of_tokens(model: RoutedModel, input_ids: Tensor, *, policy: RoutingPolicy, **inputs: Any) -> Tensor:
    """`[B, S, E]` int64: in how many layers each token chooses each expert first. One forward, without experts.

    With them, tokens that go astray would change the inputs of later layers, and lead others astray.

    Args:
        inputs: further arguments of the model's forward.
    """
    choices: dict[int, Tensor] = {}
    with torch.no_grad():
        model(input_ids, policy=replace(policy, choices=choices, apply_experts=False), logits_to_keep=1, **inputs)
    first_LT = of_all_layers(choices)[..., 0]
    return F.one_hot(first_LT, len(model.expert_names)).sum(0).view(*input_ids.shape, -1)


def winners(votes_BSE: Tensor, prompt_mask: Tensor) -> Tensor:
    """`[B, 1]`: the expert with the most votes. Those of a prompt's last token count once more for each of its tokens.

    Args:
        prompt_mask: `[B, S]` bool, True for tokens of the prompt.
    """
    mask = prompt_mask.to(votes_BSE.device).long()
    last_BS = mask * (mask.flip(1).cumsum(1).flip(1) == 1)
    weights_BS = mask + last_BS * mask.sum(1, keepdim=True)
    return (votes_BSE * weights_BS[..., None]).sum(1).argmax(1, keepdim=True)


def experts_of_prompts(
    model: RoutedModel, input_ids: Tensor, prompt_mask: Tensor, *, policy: RoutingPolicy, **inputs: Any
) -> Tensor:
    """`[B, 1]` for `RoutingPolicy.forced_experts`: the winners of the votes of the prompts' tokens, over all layers.

    Args:
        prompt_mask: as of `winners`.
        inputs: as of `votes_of_tokens`.
    """
    return winners(votes_of_tokens(model, input_ids, policy=policy, **inputs), prompt_mask)


def routed_by_prompt(
    model: RoutedModel, input_ids: Tensor, prompt_mask: Tensor, policy: RoutingPolicy, **inputs: Any
) -> RoutingPolicy:
    """The policy for texts with these prompts where `model.route_by` is "prompt"; otherwise the policy itself.

    A policy that forces experts, or leaves them out, stays as it is.
    """
    if model.route_by == "token" or len(model.expert_names) == 1 or policy.forced_experts is not None:
        return policy
    if not (policy.active and model.routing.standing.active):
        return policy
    experts_B1 = experts_of_prompts(model, input_ids, prompt_mask, policy=policy, **inputs)
    return replace(policy, forced_experts=experts_B1)


def policy_of_generation(model: RoutedModel, policy: RoutingPolicy, *args: Any, **kwargs: Any) -> RoutingPolicy:
    """`routed_by_prompt` for the arguments of transformers' `generate`.

    Raises:
        SRDEError: the prompts are given as embeddings, or not at all.
    """
    if model.route_by == "token":
        return policy
    ids: Tensor | None = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    if ids is None:
        raise SRDEError('route_by="prompt": generate() needs the prompts\' tokens. Give input_ids, or route by token.')
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    return routed_by_prompt(model, ids, mask.bool(), policy, attention_mask=mask)
