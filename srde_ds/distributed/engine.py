"""Builds a ZeRO-3 engine from the name of a base."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils.logging import disable_progress_bar

from srde_ds.config import AdapterConfig, Config, ModelConfig
from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed import zero_placement as placement
from srde_ds.distributed.deepspeed_internals import deepspeed
from srde_ds.distributed.ds_config import derive_ds_config, prefetch_whole_layers
from srde_ds.distributed.expert_parallel import ExpertGroups, expert_groups, place_experts, shard_atoms
from srde_ds.distributed.expert_traffic import choose_transport
from srde_ds.distributed.processes import Topology, check_same
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.attention import DOCUMENT_ATTENTION, inputs_of
from srde_ds.model.base import Sharding, decoder_layers, load_base, whole_shape
from srde_ds.model.base_shape import measure
from srde_ds.model.dispatch import LocalDispatch
from srde_ds.model.fused import idle_because
from srde_ds.model.output import SRDEOutput
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.recompute import recompute_selectively
from srde_ds.model.targets import Targets
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import build_groups

if TYPE_CHECKING:
    from srde_ds.model.deltas import Trainable

logger = logging.getLogger(__name__)


def gather(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """A context in which every rank can read the partitioned parameters."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters)
    return context


@dataclass
class Engine:
    """The model under ZeRO-3 with its optimizer."""

    deepspeed: Any
    model: SRDEModel
    optimizer: GramMuonAdamW
    groups: ExpertGroups | None
    trained_kinds: frozenset[str] = field(default=frozenset())
    locked_experts: frozenset[int] = field(default=frozenset())

    def __post_init__(self) -> None:
        kinds = set()
        for name, parameter in self.model.trainable_parameters():
            kinds.add(parameter.srde_kind)
            parameter.register_hook(partial(self._without_frozen, name, parameter))
        self.restrict(frozenset(kinds), frozenset())

    def restrict(self, trained: frozenset[str], locked: frozenset[int]) -> None:
        """From the next step on, change only trainables of these kinds, and no locked expert."""
        if (trained, locked) != (self.trained_kinds, self.locked_experts):
            placement.restrict_updates(self.deepspeed, self.model, self.optimizer, trained, locked)
            self.trained_kinds, self.locked_experts = trained, locked

    def _without_frozen(self, name: str, parameter: Trainable, gradient: torch.Tensor) -> torch.Tensor | None:
        """Zero instead of None, for which DeepSpeed would use the last gradient and count it in the clipping norm."""
        kind = parameter.srde_kind
        if kind not in self.trained_kinds:
            return torch.zeros_like(gradient)
        # The optimizer skips locked deltas, and routing vectors that never got a gradient. Zeroing keeps them out of
        # the norm as well. Atoms are shared: their experts are locked only while they get no tokens.
        if not self.locked_experts or kind not in ("free", "router"):
            return None
        axis = parameter.srde_expert_axis or 0
        layer = self.model.layers[int(name.split(".")[1])]
        first = layer.deltas.first_expert if kind == "free" else 0
        lines = 3 if kind == "free" and axis == 1 else 1  # a neuron expert's gate, up and down
        gradient = gradient.clone()
        for expert in range(gradient.shape[axis] // lines):
            if first + expert in self.locked_experts:
                gradient.narrow(axis, lines * expert, lines).zero_()
        return gradient

    def forward(
        self, batch: dict[str, torch.Tensor], policy: RoutingPolicy | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a CPU batch from the loader: the weighted sum over its labels, and their number, as scalars on the
        device.

        Args:
            policy: default: all experts allowed, no auxiliary losses, nothing recorded.
        """
        output: SRDEOutput = self.deepspeed(**self.inputs(batch), policy=policy)
        assert output.loss_sum is not None and output.label_count is not None
        return output.loss_sum, output.label_count

    def delta_norms(self) -> torch.Tensor:
        """`[E]`: the norm of each expert's deltas over all layers; the same on every rank."""
        own = self.model.delta_norms(gather=gather)
        if self.groups is None or len(own) == self.model.config.num_experts:
            return own
        experts, first = self.model.config.num_experts, self.model.layers[0].deltas.first_expert
        norms = own.new_zeros(experts)
        norms[first : first + len(own)] = own[: max(0, experts - first)]
        dist.all_reduce(norms, group=self.groups.expert_parallel)
        return norms

    @torch.no_grad()
    def set_trainables(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set trainables, both fp32 masters and parameters, to whole tensors. Their optimizer state is reset to zero.

        Args:
            tensors: by stable name (`layers.0.router.weight`), with all experts and no padding; equal on all ranks.

        Raises:
            SRDEError: there is no such trainable, or it has another shape.
        """
        slices = placement.state_slices(self.deepspeed, self.model, self.optimizer)
        known = {name for name, _ in self.model.trainable_parameters()}
        unknown = sorted(set(tensors) - known)
        if unknown:
            raise SRDEError(f"'{unknown[0]}' is not a trainable of this model, which has {min(known)} to {max(known)}.")
        for part in slices:
            if part.name not in tensors:
                continue
            tensor = tensors[part.name]
            if tuple(tensor.shape) != part.global_shape:
                raise SRDEError(f"'{part.name}': shape {list(tensor.shape)}, expected {list(part.global_shape)}.")
            if part.kind != "master":
                part.data.zero_()
                continue
            strides = (1,) if part.data.dim() == 1 else (part.stride, 1)
            values = tensor.to(part.data).contiguous()
            part.data.copy_(values.as_strided(part.data.shape, strides, part.offset))
        internals.publish_masters(self.deepspeed)

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The model's inputs from a batch of the loader.

        Labels and document boundaries are examined on the CPU, before the copy.
        """
        labels = Targets.of(batch["labels"], batch.get("label_weights"))
        return {"labels": labels} | inputs_of(self.model.base, batch, self.device)

    @property
    def device(self) -> torch.device:
        """The device of the model and the losses."""
        return self.model.layers[0].support.device

    def close(self) -> None:
        """Free what DeepSpeed has attached to the model, so that another engine can be built."""
        self.deepspeed.destroy()
        internals.forget(self.model)

    @property
    def global_grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self.deepspeed.get_global_grad_norm())


def load_frozen_base(model: ModelConfig, topology: Topology, ds_config: dict[str, Any] | None) -> PreTrainedModel:
    """Load the frozen base: with a DeepSpeed configuration only this rank's share of the weights, 1 / world_size."""
    attention = "flash_attention_2" if model.flash_attention else packed_attention(model)
    if not topology.is_main:
        disable_progress_bar()
    # from_pretrained finds the object through a weak reference, so it must exist until loading is done.
    keep_alive = None if ds_config is None else HfDeepSpeedConfig(ds_config)
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    base = load_base(
        str(model.model_name),
        dtype=dtype,
        revision=model.model_revision,
        attn_implementation=attention,
        device=topology.device if ds_config is None else None,
        quantization=model.base_quantization,
    )
    del keep_alive
    internals.note_whole_shapes(base)
    return base


def packed_attention(model: ModelConfig) -> str:
    """The name in transformers of the attention to use for packed rows."""
    return DOCUMENT_ATTENTION if measure(model).layers[0].documents else "sdpa"


def build_model(
    config: Config,
    topology: Topology,
    *,
    adapter: AdapterConfig | None = None,
    supports: Sequence[torch.Tensor] | None = None,
    target_density: float | None = None,
) -> SRDEModel:
    """Build the base with all its experts, the same on every rank.

    Args:
        adapter: default: `config.adapter`; another one may have another density.
        supports: those of all layers, from a checkpoint; default: chosen as the adapter says.
        target_density: final density of a support that is being learned, see `add_experts`.
    """
    whole = config.parallel.whole_base(topology.world_size)
    ds_config = None if whole else derive_ds_config(config, topology.world_size)
    base = load_frozen_base(config.model, topology, ds_config)
    model = add_experts(
        base,
        adapter or config.adapter,
        expert_names=config.expert_names,
        seed=config.training.seed,
        supports=supports,
        target_density=target_density,
        sharding=Sharding(gather, pad_to=topology.world_size),
    )
    if whole:  # each rank has read it by itself
        check_same({"hash of the base's weights": model.base_identity["hash"]}, topology)
    if config.model.expert_kernels and topology.is_main:
        warn_of_idle_kernels(model)
    for layer in model.layers:
        layer.dispatch = LocalDispatch(compiled=config.model.compile, kernels=config.model.expert_kernels)
    if config.model.recomputed == "selective":
        recompute_selectively(model.base, model.routing)
    elif config.model.recomputed == "full":
        # The kind whose results are tested to equal plain training under ZeRO-3; see docs/decisions.md.
        model.enable_gradient_checkpointing(use_reentrant=True)
    return model.train()


def warn_of_idle_kernels(model: SRDEModel) -> None:
    """Tell why `expert_kernels` has no effect, if there is a reason."""
    layer = model.layers[0]
    if reason := idle_because(getattr(layer.block, layer.roles["act"]), layer.support.shape[-1]):
        logger.warning("expert_kernels=true has no effect: %s. The experts are computed without them.", reason)


def build_engine(model: SRDEModel, config: Config, topology: Topology) -> Engine:
    """Partition the model, create the optimizer, and check that each part is on the right rank."""
    groups, transport, work = None, "", Workload.of(config, topology.world_size)
    if config.parallel.expert_parallel_size > 1:
        groups = expert_groups(config.parallel.expert_parallel_size)
        transport = choose_transport(work, [(layer.hidden, layer.intermediate) for layer in model.layers])
    if work.shards_atoms:
        shard_atoms(model, expert_groups(topology.world_size), groups, transport)
    elif groups is not None:
        place_experts(model, groups, transport)
    placement.mark_placement(model)
    if work.whole_base:
        internals.leave_alone(model.base)
    parameters = model.trainable_parameters()
    optimizer = GramMuonAdamW(build_groups(parameters, config.optimizer, config.adapter.granularity))
    ds_config = derive_ds_config(config, topology.world_size)
    decoder = decoder_layers(model.base)
    largest = max(sum(prod(whole_shape(p)) for p in layer.parameters()) for layer in decoder)
    prefetch_whole_layers(ds_config, largest)
    internals.gather_in_one_order()
    # A process that is alone gathers nothing, so nothing need wait for its layer.
    with internals.hooked_as_one([model] if topology.world_size == 1 else decoder):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if work.whole_base:
        internals.restore_linear()
    internals.note_whole_shapes(model)
    for layer in model.layers:
        layer.skip_activation_hooks = internals.is_hooked_for_nothing(getattr(layer.block, layer.roles["act"]))
    placement.verify_placement(engine, model)
    return Engine(engine, model, optimizer, groups)
