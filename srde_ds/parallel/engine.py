"""From a base's name to a running ZeRO-3 engine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from srde_ds.config import Config
from srde_ds.model.adapter import SRDEModel, SRDEOutput, add_experts
from srde_ds.model.base import load_base
from srde_ds.model.dispatch import LocalDispatch
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import build_groups
from srde_ds.parallel import placement
from srde_ds.parallel.cost import base_shape, choose_transport
from srde_ds.parallel.ds_config import derive_ds_config
from srde_ds.parallel.expert_parallel import ExpertGroups, cut_experts, expert_groups
from srde_ds.parallel.topology import Topology, deepspeed


def gather(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """A context in which partitioned parameters are readable on every rank."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters)
    return context


@dataclass
class Engine:
    """The model under ZeRO-3 with its optimizer."""

    deepspeed: Any
    model: SRDEModel
    optimizer: GramMuonAdamW
    groups: ExpertGroups | None

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch from the loader: its sum over labels and their number (scalars on the device)."""
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels", "token_mask")}
        output: SRDEOutput = self.deepspeed(**inputs)
        assert output.loss_sum is not None and output.label_count is not None
        return output.loss_sum, output.label_count

    def delta_norms(self) -> torch.Tensor:
        """`[E]` norm of each expert's deltas over all layers, the same on every rank."""
        own = self.model.delta_norms(gather=gather)
        if self.groups is None:
            return own
        experts, first = self.model.config.num_experts, self.model.layers[0].deltas.first_expert
        norms = own.new_zeros(experts)
        norms[first : first + len(own)] = own[: max(0, experts - first)]
        dist.all_reduce(norms, group=self.groups.expert_parallel)
        return norms

    @property
    def global_grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self.deepspeed.get_global_grad_norm())


def load_sharded_base(config: Config, world_size: int) -> PreTrainedModel:
    """The frozen base; each rank keeps 1 / world_size of its weights from the first byte on."""
    # from_pretrained finds the object through a weak reference: it must live until loading is done.
    keep_alive = HfDeepSpeedConfig(derive_ds_config(config, world_size))
    base = load_base(
        str(config.model.model_name),
        dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        revision=config.model.model_revision,
        attn_implementation="flash_attention_2" if config.model.flash_attention else "sdpa",
    )
    del keep_alive
    return base


def build_model(config: Config, topology: Topology) -> SRDEModel:
    """The sharded base with all its experts, on every rank alike."""
    base = load_sharded_base(config, topology.world_size)
    names = config.data.domains[: config.adapter.num_experts]
    names += [f"expert_{i}" for i in range(len(names), config.adapter.num_experts)]
    model = add_experts(
        base,
        config.adapter,
        expert_names=names,
        seed=config.training.seed,
        row_multiple=topology.world_size,
        gather=gather,
    )
    if config.model.compile:
        for layer in model.layers:
            layer.dispatch = LocalDispatch(compiled=True)
    if config.model.gradient_checkpointing:
        # The kind whose equality with plain training is tested under ZeRO-3; see docs/decisions.md.
        model.enable_gradient_checkpointing(use_reentrant=True)
    return model.train()


def build_engine(model: SRDEModel, config: Config, topology: Topology) -> Engine:
    """Partition everything, create the optimizer, and check that each piece is where it must be."""
    groups = None
    if config.parallel.expert_parallel_size > 1:
        groups = expert_groups(config.parallel.expert_parallel_size)
        cut_experts(model, groups, choose_transport(config, base_shape(config)))
        placement.mark_expert_placement(model, groups)
    parameters = model.trainable_parameters()
    optimizer = GramMuonAdamW(build_groups(parameters, config.optimizer, config.adapter.granularity))
    ds_config = derive_ds_config(config, topology.world_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    placement.verify_placement(engine, model, groups)
    placement.register_muon_layouts(engine, model, optimizer)
    return Engine(engine, model, optimizer, groups)
