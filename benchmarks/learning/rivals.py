"""What SRDE is compared with: adapters of the same number of trainable values in the same base, and their optimizer.

Each function of `PARAMETERS` puts a rival into the base and returns its trainables. The number of values is that of
SRDE with the flags `values_of`; the target is the feed-forward projections or, with `target: all`, all linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.learning.data import Inputs
from benchmarks.learning.plan import WHOLE_NEURONS, Flags, Run
from srde_ds.config import DOMAINS, AdapterConfig, OptimizerConfig, resolve
from srde_ds.data.loader import validation_batches
from srde_ds.model.deltas import empty_deltas
from srde_ds.model.feed_forward import ROLES, FeedForward, find_feed_forward
from srde_ds.model.supports.selection import shared_expert_size, support_size
from srde_ds.training.warm_start.clustering import Method, fit_router

if TYPE_CHECKING:
    from peft import LoraConfig

ROUTER_ROWS_A_DOMAIN = 4


class Masters:
    """fp32 copies that the optimizer moves, of trainables that may be bfloat16; DeepSpeed does the same for SRDE.

    Attributes:
        values: one copy for each parameter; their `.grad` is the sum of what `take_gradients` has taken.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = [nn.Parameter(parameter.detach().float().clone()) for parameter in parameters]

    def take_gradients(self) -> None:
        """Add the parameters' gradients to the copies', in fp32."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                value.grad = gradient if value.grad is None else value.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies into the parameters."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)


class Both(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for the rest, as one optimizer."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([value for part in parts for group in part.param_groups for value in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def optimizer_of(values: list[nn.Parameter], settings: OptimizerConfig, *, muon: bool) -> torch.optim.Optimizer:
    """AdamW for all; or, with `muon`, Muon for matrices, at `muon_lr` times 0.2 sqrt(max(rows, columns))."""
    adamw = [value for value in values if not muon or value.dim() != 2]
    parts: list[torch.optim.Optimizer] = []
    if adamw:
        group: dict[str, Any] = {"params": adamw, "peak_lr": settings.learning_rate}
        betas = settings.adam_beta1, settings.adam_beta2
        parts.append(torch.optim.AdamW([group], betas=betas, eps=1e-8, weight_decay=settings.weight_decay))
    if matrices := [value for value in values if muon and value.dim() == 2]:
        group = {"params": matrices, "peak_lr": settings.muon_lr}
        momentum, decay = settings.muon_momentum, settings.weight_decay
        parts.append(torch.optim.Muon([group], momentum=momentum, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return parts[0] if len(parts) == 1 else Both(parts)


def lora(base: PreTrainedModel, run: Run, inputs: Inputs) -> list[nn.Parameter]:
    """PEFT's LoRA."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(base, run.flags), base)
    return [parameter for parameter in base.parameters() if parameter.requires_grad]


def lora_config(base: PreTrainedModel, flags: Flags) -> LoraConfig:
    """PEFT's options; alpha = rank: the swept rate stands for any other scale. `rslora`: scaled by 1 / sqrt(rank)."""
    from peft import LoraConfig

    targets, width = _targets(base, flags.get("target", "feed-forward"))
    rank = equal_rank(base, width, flags["values_of"])
    return LoraConfig(r=rank, lora_alpha=rank, use_rslora=bool(flags.get("rslora")), target_modules=targets)


def shira(base: PreTrainedModel, run: Run, inputs: Inputs) -> list[nn.Parameter]:
    """PEFT's SHiRA on the three projections: random single weights, as many as LoRA of the same rank has values."""
    from peft import ShiraConfig, inject_adapter_in_model

    targets, width = _targets(base, "feed-forward")
    rank = equal_rank(base, width, run.flags["values_of"])
    inject_adapter_in_model(ShiraConfig(r=rank, random_seed=run.seed, target_modules=targets), base)
    return [parameter for parameter in base.parameters() if parameter.requires_grad]


def all_feed_forward(base: PreTrainedModel, run: Run, inputs: Inputs) -> list[nn.Parameter]:
    """The weights of all feed-forward blocks."""
    parameters = [weight for block in find_feed_forward(base) for weight in block.weights()]
    return [parameter.requires_grad_() for parameter in parameters]  # type: ignore[misc]


class RoutedLoRA(nn.Module):
    """A feed-forward block whose experts are LoRA adapters of its three projections, in MixLoRA's form (Li et al. 2024,
    arXiv 2404.15159): y = sum_e p_e FFN(x; W + B_e A_e) over a token's top K, softmax over the chosen logits.

    Children: `block`, the base's own; `router` `[E, D]`; `first` and `second` by role, `[E, r, in]` and `[E, out, r]`.
    """

    def __init__(self, feed_forward: FeedForward, *, experts: int, top_k: int, rank: int, router: Tensor) -> None:
        super().__init__()
        self.block, self.roles, self.top_k = feed_forward.block, feed_forward.roles, top_k
        weight = feed_forward.weights()[0]
        self.router = nn.Parameter(router.to(weight.dtype))
        self.first, self.second = nn.ParameterDict(), nn.ParameterDict()
        for role in ROLES:
            linear = getattr(self.block, self.roles[role])
            out, inner = linear.weight.shape
            bound = 1 / inner**0.5  # PEFT's start of A: uniform, as nn.Linear's; B starts at zero
            self.first[role] = nn.Parameter(weight.new_empty(experts, rank, inner).uniform_(-bound, bound))
            self.second[role] = nn.Parameter(weight.new_zeros(experts, out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        x_TD = x.flatten(0, -2)
        logits_TE = F.linear(x_TD.float(), self.router.float())
        chosen_TK, index_TK = logits_TE.topk(self.top_k, dim=1)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, chosen_TK.softmax(dim=1)).to(x.dtype)
        gate, up, down = (getattr(self.block, self.roles[role]) for role in ROLES)
        act = getattr(self.block, self.roles["act"])
        gate_TF, up_TF = gate(x_TD), up(x_TD)
        mixed_TF, result_TD = torch.zeros_like(gate_TF), torch.zeros_like(x_TD)
        for expert in range(len(self.router)):
            token = weights_TE[:, expert].nonzero().squeeze(1)
            own = x_TD[token]
            hidden = act(gate_TF[token] + self._low_rank("gate", expert, own))
            hidden = hidden * (up_TF[token] + self._low_rank("up", expert, own)) * weights_TE[token, expert, None]
            mixed_TF = mixed_TF.index_add(0, token, hidden)
            result_TD = result_TD.index_add(0, token, self._low_rank("down", expert, hidden))
        return (down(mixed_TF) + result_TD).view_as(x)

    def _low_rank(self, role: str, expert: int, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first[role][expert]), self.second[role][expert])


def routed_lora(base: PreTrainedModel, run: Run, inputs: Inputs) -> list[nn.Parameter]:
    """A LoRA expert a domain, with SRDE's router, which starts from the domains' means as SRDE's warm start does."""
    experts, top_k = len(DOMAINS), 2
    blocks = find_feed_forward(base)
    rank = max(1, round(equal_rank(base, _targets(base, "feed-forward")[1], run.flags["values_of"]) / experts))
    for block, router in zip(blocks, domain_routers(base, blocks, inputs, run.seed), strict=True):
        routed = RoutedLoRA(block, experts=experts, top_k=top_k, rank=rank, router=router)
        parent, name = _parent(base, block.block)
        setattr(parent, name, routed)
    routers = [module for module in base.modules() if isinstance(module, RoutedLoRA)]
    return [p for module in routers for p in (module.router, *module.first.values(), *module.second.values())]


@torch.no_grad()
def domain_routers(
    base: PreTrainedModel, blocks: list[FeedForward], inputs: Inputs, seed: int, method: Method = "domain_means"
) -> list[Tensor]:
    """Router weights `[E, D]` by layer, from the inputs of each block on each domain.

    Args:
        method: "domain_means" or "discriminant", see `fit_router`.
    """
    rows = inputs.split("train")
    domain_of_row = rows.with_format("numpy")["domain"][:]
    seen: list[list[Tensor]] = [[] for _ in blocks]
    hooks = [
        block.block.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0].flatten(0, -2).float()))
        for block, own in zip(blocks, seen, strict=True)
    ]
    labels: list[np.ndarray] = []
    kept: list[list[Tensor]] = [[] for _ in blocks]
    try:
        for domain in range(len(DOMAINS)):
            own_rows = rows.select((domain_of_row == domain).nonzero()[0][:ROUTER_ROWS_A_DOMAIN].tolist())
            for batch in validation_batches(own_rows, ROUTER_ROWS_A_DOMAIN):
                base(input_ids=batch["input_ids"].to(base.device), position_ids=batch["position_ids"].to(base.device))
                mask = batch["token_mask"].flatten()
                for layer, chunks in enumerate(seen):
                    kept[layer].append(chunks.pop()[mask])
                labels.append(np.full(int(mask.sum()), domain))
    finally:
        for hook in hooks:
            hook.remove()
    routers = []
    for layer, chunks in enumerate(kept):
        points = torch.cat(chunks).numpy()
        fit = fit_router(
            points, np.concatenate(labels), num_experts=len(DOMAINS), method=method, seed=seed, layer=layer
        )
        routers.append(torch.from_numpy(fit.weights))
    return routers


PARAMETERS: dict[str, Callable[[PreTrainedModel, Run, Inputs], list[nn.Parameter]]] = {
    "lora": lora,
    "routed_lora": routed_lora,
    "shira": shira,
    "full": all_feed_forward,
}


def equal_rank(base: PreTrainedModel, width: int, flags: Flags) -> int:
    """The rank at which adapters have as many values as SRDE with these flags has trainables.

    Args:
        width: sum of the input and output widths of all adapted layers.
    """
    adapter = resolve({}, WHOLE_NEURONS | flags).adapter
    values = sum(_srde_values(adapter, block.hidden, block.intermediate) for block in find_feed_forward(base))
    return max(1, round(values / width))


def _targets(base: PreTrainedModel, target: str) -> tuple[list[str], int]:
    """Names of the adapted projections, and the sum of their input and output widths over all layers."""
    blocks = find_feed_forward(base)
    names = {block.roles[role] for block in blocks for role in ROLES}
    if target == "all":
        layers = base.get_decoder().layers
        names |= {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    linear = [m for n, m in base.named_modules() if n.rpartition(".")[2] in names and isinstance(m, nn.Linear)]
    return sorted(names), sum(module.in_features + module.out_features for module in linear)


def _srde_values(adapter: AdapterConfig, hidden: int, intermediate: int) -> int:
    bank = empty_deltas(adapter, hidden=hidden, size=support_size(adapter, hidden, intermediate))
    values = sum(parameter.numel() for parameter in bank.parameters()) + adapter.num_experts * hidden
    return values + 3 * hidden * shared_expert_size(adapter, intermediate)


def _parent(base: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    for module in base.modules():
        for name, candidate in module.named_children():
            if candidate is child:
                return module, name
    raise ValueError("the block is not in the base")
