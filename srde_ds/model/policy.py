"""The policy: how one forward routes its tokens, and how the layers learn of it.

The decoder layers between `SRDEModel.forward` and `SRDEFeedForward.forward` belong to transformers and do not pass our
arguments on. So the model makes a policy current while its forward runs (`PolicyControl.running`), and each layer reads
it in its first line.

Why this is right however a forward is run:

* A policy is immutable, and what a backward needs of it is kept in the forward's own graph. Several forwards before one
    backward, each with its own policy, do not disturb each other, and nothing has to be reset.
* Activation checkpointing runs decoder layers again in the backward, after the forward has ended.
  `PolicyKeepingCheckpoint` remembers the policy of the first run and makes it current for the second, so both compute
  the same.
* The current policy is a plain attribute of an object that the layers share. torch.compile guards such a read and
  compiles again for another policy. It cannot trace a context variable, and would read a thread-local only once.
  A model on one device is run by one thread at a time: autograd's threads recompute while the caller waits in
  `backward`.
* Outside of a forward of this model (when `generate` or a pipeline calls `model.base`) the layers follow the standing
  policy, which `set_active_experts` and `no_experts` change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from srde_ds.errors import SRDEError
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.model.targets import on_device


@dataclass(frozen=True)
class AuxiliaryWeights:
    """Weights of the auxiliary losses of a training run; 0 leaves a loss out.

    Attributes:
        load_balancing, router_z: weights of the router's losses, see `router.ExpertWeights`; `RoutingPolicy.loss_scale`
            multiplies both.
        delta_size: weight of the squared size of the unlocked experts' effective deltas.
        support_overlap: weight of the overlap between the experts' learned supports.

    Every backward adds the whole gradient of the last two, so their weights must be divided by a step's micro-steps.
    """

    load_balancing: float = 0.0
    router_z: float = 0.0
    delta_size: float = 0.0
    support_overlap: float = 0.0


@dataclass(frozen=True, eq=False)
class RoutingPolicy:
    """How one forward routes its tokens, and what it records. Pass it to `SRDEModel.forward` or `generate`:

        choices: dict[int, Tensor] = {}
        model(input_ids, policy=RoutingPolicy(choices=choices))
        choices[0]  # the experts that each token used in the first layer

    The model copies tensors to its device. A GPU does not wait for those on the CPU.

    Attributes:
        active: False gives the base's own output.
        apply_experts: False as well, but the routers choose from the base's inputs, and `choices` is filled.
        allowed_experts: `[E]` bool, False for locked experts, which get no tokens. If fewer than top_k are allowed, a
            token uses only those. None: those of `set_active_experts`, by default all.
        forced_experts: `[B, S]` int64: each token uses only this expert, with weight 1, and the router and its losses
            are left out. `[B, 1]`: all tokens of a row use one expert, also in the steps of `generate`.
        token_mask: `[B, S]` bool, True for real tokens; None: all are. Padding counts in no statistic and no loss.
        auxiliary_weights: weights of the auxiliary losses, whose gradients the backward adds.
        loss_scale: scalar factor of the router's losses, which are sums over tokens. For a mean over the tokens of an
            optimizer step under data-parallel averaging: number of ranks / tokens of the step on all ranks.
        expert_share: `[L, E]` each expert's share of the assignments of the previous optimizer step; None: not known
            yet, so there is no load balancing.
        target_share: `[E]` the shares that load balancing aims at, see `training.balancing`; None: equal shares.
        support_temperature: temperature of the noise on a support that is being learned; None: no noise, and its scores
            get no gradient. In eval mode there is never noise.
        noise_step: number of the optimizer step, which seeds the noise.
        statistics: where the forward's routing is added. A forward with gradients is counted by its backward, so only
            once even if it is recomputed. One without gradients is counted directly, but only in eval mode.
        choices: filled by the forward: layer -> `[T, K]` int64, best first, -1 where fewer than K experts are allowed.
        choice_weights: filled by the forward: layer -> `[T, K]`, the weights p_e of `choices`, 0 for -1.
    """

    active: bool = True
    apply_experts: bool = True
    allowed_experts: Tensor | None = None
    forced_experts: Tensor | None = None
    token_mask: Tensor | None = None
    auxiliary_weights: AuxiliaryWeights = AuxiliaryWeights()
    loss_scale: float | Tensor = 0.0
    expert_share: Tensor | None = None
    target_share: Tensor | None = None
    support_temperature: float | None = None
    noise_step: int = 0
    statistics: RoutingStatistics | None = None
    choices: dict[int, Tensor] | None = None
    choice_weights: dict[int, Tensor] | None = None

    def real_tokens(self, values: Tensor) -> Tensor:
        """`[T]` bool, on the device of values of T tokens: True for real ones."""
        if self.token_mask is None:
            return values.new_ones(len(values), dtype=torch.bool)
        return self.token_mask.reshape(-1).to(values.device)

    def to(self, device: torch.device) -> RoutingPolicy:
        """The same policy with its tensors on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: on_device(value, device) for name, value in tensors.items()}
        return replace(self, **moved)


def of_all_layers(recorded: dict[int, Tensor], dim: int = 0) -> Tensor:
    """What all layers have recorded in `choices` or `choice_weights`, stacked on the first layer's device."""
    values = list(recorded.values())
    return torch.stack([own.to(values[0].device) for own in values], dim=dim)


class PolicyControl:
    """Gives all layers of a model the current policy.

    Attributes:
        standing: applies outside of `running`, and inside to what a policy leaves open: `active=False` here switches
            all experts off, and `allowed_experts` holds for a policy without its own.
    """

    def __init__(self) -> None:
        self.standing = RoutingPolicy()
        self._running: RoutingPolicy | None = None

    @property
    def policy(self) -> RoutingPolicy:
        """The current policy."""
        return self.standing if self._running is None else self._running

    @contextmanager
    def running(self, policy: RoutingPolicy, device: torch.device | None = None) -> Iterator[None]:
        """Make a policy current, completed by the standing one.

        Args:
            device: where to copy its tensors; None: they stay where they are.

        Raises:
            SRDEError: every expert is locked.
        """
        allowed = self.standing.allowed_experts if policy.allowed_experts is None else policy.allowed_experts
        if allowed is not None and not bool(allowed.any()):
            raise SRDEError("allowed_experts: all experts are locked; allow at least one.")
        policy = replace(policy, active=policy.active and self.standing.active, allowed_experts=allowed)
        if policy.statistics is not None and device is not None:
            policy.statistics.sums(device)  # created here, so that no layer has to
        with self._exactly(policy if device is None else policy.to(device)):
            yield

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which will always run under the policy that is current now."""
        policy = self.policy

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._exactly(policy):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def _exactly(self, policy: RoutingPolicy) -> Iterator[None]:
        before, self._running = self._running, policy
        try:
            yield
        finally:
            self._running = before


class PolicyKeepingCheckpoint:
    """A checkpointing function for transformers whose second run follows the policy of the first.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its options.
    """

    def __init__(self, checkpoint: Callable[..., Any], control: PolicyControl) -> None:
        self.checkpoint, self.control = checkpoint, control

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `function(*args)`, whose activations are recomputed in the backward."""
        return self.checkpoint(self.control.bound(function), *args, **kwargs)


def keep_policy_when_recomputing(base: nn.Module, control: PolicyControl) -> None:
    """Have all layers of a base that recompute their activations follow the policy of their first run.

    Layers that already do so are not changed."""
    module: Any
    for module in base.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, PolicyKeepingCheckpoint):
            module._gradient_checkpointing_func = PolicyKeepingCheckpoint(checkpoint, control)


def refuse_foreign_checkpointing(base: nn.Module) -> None:
    """Raise an SRDEError if a layer recomputes its activations without the policy of its first run."""
    for layer in base.modules():
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        ours = checkpoint is None or isinstance(checkpoint, PolicyKeepingCheckpoint)
        if not ours and getattr(layer, "gradient_checkpointing", False):
            raise SRDEError(
                "the base recomputes activations without this forward's policy; call "
                "enable_gradient_checkpointing of the SRDEModel instead of the base's."
            )
