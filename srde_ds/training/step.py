"""One optimizer step of all ranks: forward and backward of its micro-batches, and the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from srde_ds.config import Config
from srde_ds.data.packing import NO_LABEL
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.liveness.status import doing
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.optim.schedule import learning_rate_factor, set_learning_rates, set_step
from srde_ds.training.checkpointing import RunState
from srde_ds.training.curriculum import Curriculum
from srde_ds.training.reporting.held_out import Batch
from srde_ds.training.reporting.step_metrics import sum_over_ranks, to_host


def optimizer_step(
    config: Config,
    topology: Topology,
    engine: Engine,
    curriculum: Curriculum,
    state: RunState,
    interrupted: Callable[[], bool],
) -> dict[str, torch.Tensor] | None:
    """Do one step on all ranks: forward and backward of its micro-batches, and the update.

    The host waits for the GPU only in DeepSpeed's update and for the sums at the end.

    Returns:
        Sums over all ranks: "loss" and "label_weight" (their ratio is the mean loss), "real_tokens", "domain_tokens" by
        domain, and the routing statistics. None if `interrupted` became true: then nothing was updated.
    """
    stream = curriculum.begin_step(engine)
    doing("reading rows")
    batches = [
        stream.micro_batch(
            state.step, micro, rank=topology.rank, world_size=topology.world_size, batch_size=config.training.batch_size
        )
        for micro in range(config.training.gradient_accumulation_steps)
    ]
    counts = sum_over_ranks(count_tokens(batches, len(config.data.domains)), topology.device)
    factor = learning_rate_factor(state.step, config.training.max_steps, config.optimizer)
    set_learning_rates(engine.optimizer, factor)
    set_step(engine.optimizer, state.step + 1)
    loss_sum = torch.zeros((), dtype=torch.float64, device=topology.device)
    # DeepSpeed averages over ranks and micro-steps; these factors turn that into the mean over the step's labels.
    micro_steps = topology.world_size * len(batches)
    weight = counts["label_weight"]
    loss_scale = (micro_steps / torch.where(weight == 0, torch.ones_like(weight), weight)).float()
    router_loss_scale = topology.world_size / counts["real_tokens"].clamp(min=1)
    statistics = RoutingStatistics(len(engine.model.layers), config.adapter.num_experts)
    for number, batch in enumerate(batches, 1):
        if interrupted():
            return None
        policy = replace(curriculum.policy_of(batch), loss_scale=router_loss_scale, statistics=statistics)
        doing(f"forward of micro-step {number}")
        batch_loss, _ = engine.forward(batch, policy)
        doing(f"backward of micro-step {number}")
        engine.deepspeed.backward(batch_loss * loss_scale)
        doing(f"update after micro-step {number}")
        engine.deepspeed.step()
        loss_sum += batch_loss.detach()
    routing = statistics.pop()
    # Within the backward, gradients are those of the scaled loss; DeepSpeed divides by the ranks when it adds them up.
    routing["delta_gradient_square"] /= topology.world_size**2
    return to_host(counts | sum_over_ranks({"loss": loss_sum, **routing}, topology.device))


def count_tokens(batches: list[Batch], domains: int) -> dict[str, torch.Tensor]:
    """Count this rank's micro-batches: the sum of label weights, and real tokens in total and by domain."""
    label_weight = torch.stack([_label_weight(batch) for batch in batches]).sum()
    by_domain = torch.zeros(domains, dtype=torch.float64)
    for batch in batches:
        by_domain.index_add_(0, batch["domain"], batch["token_mask"].sum(1).double())
    return {"label_weight": label_weight, "real_tokens": by_domain.sum(), "domain_tokens": by_domain}


def _label_weight(batch: Batch) -> torch.Tensor:
    if "label_weights" in batch:
        return batch["label_weights"][:, 1:].double().sum()
    return (batch["labels"][:, 1:] != NO_LABEL).sum()
