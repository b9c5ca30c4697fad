"""The same run, cut into ranks and micro-steps in other ways, and done without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from srde_ds.data.loader import RowStream, collate
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import load_base
from srde_ds.optim.reference import adamw_step, muon_step
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import (
    DOMAINS,
    ROWS_PER_STEP,
    SEED,
    Inputs,
    assert_close,
    assert_same_training,
    cut,
    metrics,
    train_here,
    weights,
)

# Another cut adds up the same fp32 numbers in another order: 1e-7 of a gradient. Muon divides by the momentum's
# singular values, and Adam by the gradient's own size, so that small components of an update move by some thousand
# times that; six updates carry it on. Measured 2e-5 in the weights, 2e-6 in the metrics.
TOLERANCE = 1e-4


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_size_and_accumulation_do_not_matter(
    inputs: Inputs,
    world_size: int,
    one_rank: Ranks,
    two_ranks: Ranks,
    four_ranks: Ranks,
    reference: Path,
    tmp_path: Path,
) -> None:
    """The reference has 2 ranks and 2 micro-steps of two rows: here 1 x 1, 2 x 1 and 4 x 2; D 30 needs padding on 4."""
    ranks = {1: one_rank, 2: two_ranks, 4: four_ranks}[world_size]
    batch_size = {1: 8, 2: 4, 4: 1}[world_size]
    accumulation = ROWS_PER_STEP // world_size // batch_size
    flags = inputs.flags(tmp_path / "run", batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert ranks(train_here, flags) == [None] * world_size
    assert_same_training(tmp_path / "run", reference, tolerance=TOLERANCE)


def test_the_gradients_norm_is_that_of_the_loss(
    inputs: Inputs, one_rank: Ranks, reference: Path, tmp_path: Path
) -> None:
    """With the same micro-batches as the reference, which two ranks share."""
    flags = inputs.flags(tmp_path / "run", max_steps=1, warmup_steps=0, batch_size=2, gradient_accumulation_steps=4)
    assert one_rank(train_here, flags) == [None]
    alone, shared = (metrics(folder)[0]["expert_gradient_norm"] for folder in (tmp_path / "run", reference))
    assert_close(alone, shared, TOLERANCE, "expert_gradient_norm")


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"num_atoms": 4, "atom_mixing": "linear"}, TOLERANCE),
        # Three experts give the one matrix of four atoms a gradient of rank three: Muon also scales up its fourth
        # singular value, which is rounding alone. It shows in the norms of the deltas.
        ({"num_atoms": 4, "atom_mixing": "softmax", "granularity": "element"}, 5e-3),
        ({"use_muon": False, "neuron_parts": 1}, TOLERANCE),
        ({"use_muon": False, "neuron_parts": 3, "learning_rate": 0.015}, TOLERANCE),
        ({"loss_weighting": "document"}, TOLERANCE),
        ({"loss_weighting": "domain"}, TOLERANCE),
    ],
    ids=["atoms", "element", "adamw", "parts", "documents alike", "domains alike"],
)
def test_one_and_two_ranks_agree(
    inputs: Inputs, changes: dict[str, Any], tolerance: float, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    flags = inputs.flags(tmp_path / "two", max_steps=4, save_steps=0, eval_steps=0, batch_size=2, **changes)
    flags["gradient_accumulation_steps"] = 2
    assert two_ranks(train_here, flags) == [None, None]
    flags |= {"output_dir": str(tmp_path / "one"), "batch_size": 4}
    assert one_rank(train_here, flags) == [None]
    assert_same_training(tmp_path / "one", tmp_path / "two", tolerance=tolerance, metric_tolerance=tolerance / 10)


def test_checkpointing_recomputes_the_same(inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path) -> None:
    """Losses, statistics and gradients count once, although the forward runs twice."""
    assert two_ranks(train_here, inputs.flags(tmp_path / "run", gradient_checkpointing=True)) == [None, None]
    assert_same_training(tmp_path / "run", reference, same_cut=True, tolerance=0)


def test_engine_equals_a_plain_loop_in_double_precision(inputs: Inputs, reference: Path, tmp_path: Path) -> None:
    """The run without DeepSpeed, shards and GramMuon: whole matrices, autograd for every loss, float64 updates."""
    lines, tensors = plain_run(inputs, steps=6)
    for line, plain in zip(metrics(reference), lines, strict=True):
        for key, value in plain.items():
            assert_close(line[key], value, 1e-5, f"step {line['step']}: {key}")
    found = weights(reference)
    for name, tensor in tensors.items():
        assert_close(found[name], tensor, TOLERANCE, name)


def plain_run(inputs: Inputs, *, steps: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses and gradient norms, and the weights after `steps` steps of `inputs.flags`."""
    config = inputs.config(Path("unused"))
    optimizer, adapter, losses = config.optimizer, config.adapter, config.losses
    model = add_experts(load_base(inputs.base, dtype=torch.float32), adapter, expert_names=DOMAINS, seed=SEED).train()
    logits: list[Tensor] = []
    for layer in model.layers:
        layer.router.register_forward_hook(lambda module, args, output: logits.append(output))
    stream = RowStream(
        load_rows(inputs.dataset, "train", load_manifest(inputs.dataset)), seed=SEED, global_batch_rows=ROWS_PER_STEP
    )
    masters = {name: parameter.detach().double() for name, parameter in model.trainable_parameters()}
    moments = {name: [torch.zeros_like(master)] * 2 for name, master in masters.items()}
    shares = [torch.full((adapter.num_experts,), 1 / adapter.num_experts)] * len(model.layers)
    lines = []
    for step in range(steps):
        batch = collate(stream.rows, stream.rows_of_step(step))
        del batch["domain"]
        logits.clear()
        output = model(**batch)
        loss = output.loss_sum / output.label_count
        real = batch["token_mask"].flatten()
        auxiliary = torch.zeros(())
        for number, layer_logits in enumerate(logits):
            layer_logits = layer_logits[real]
            balancing = adapter.num_experts * (shares[number] * layer_logits.softmax(1).mean(0)).sum()
            auxiliary += losses.load_balancing_weight * balancing
            auxiliary += losses.router_z_weight * layer_logits.logsumexp(1).square().mean()
            chosen = layer_logits.topk(adapter.top_k, dim=1).indices
            shares[number] = chosen.flatten().bincount(minlength=adapter.num_experts) / chosen.numel()
        model.zero_grad()
        (loss + auxiliary).backward()
        gradients = {name: p.grad.double() for name, p in model.trainable_parameters() if p.grad is not None}
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        clip = min(1.0, optimizer.max_grad_norm / float(norm))
        # Warm-up over two steps, then a half cosine to zero at the last step.
        factor = (0.5, 1.0, 0.8535533906, 0.5, 0.1464466094, 0.0)[step]
        for name, parameter in model.trainable_parameters():
            gradient, (first, second) = clip * gradients[name], moments[name]
            if name.endswith("deltas.free"):
                masters[name], moments[name][0] = muon_step(
                    masters[name], gradient, first, lr=factor * optimizer.muon_lr,
                    momentum=optimizer.muon_momentum, weight_decay=optimizer.weight_decay,
                )  # fmt: skip
            else:
                masters[name], *moments[name] = adamw_step(
                    masters[name], gradient, (first, second), step=step + 1, lr=factor * optimizer.router_lr,
                    betas=(optimizer.adam_beta1, optimizer.adam_beta2), eps=1e-8, weight_decay=0.0,
                )  # fmt: skip
            with torch.no_grad():
                parameter.copy_(masters[name])
        lines.append({"loss": loss.item(), "grad_norm": norm.item()})
    return lines, masters


def train_and_count_breaks(flags: dict[str, Any]) -> int:
    """The places where torch.compile had to leave what it compiles."""
    counters["graph_break"].clear()
    train_here(flags)
    return counters["graph_break"].total()


def test_compiled_experts_train_alike(inputs: Inputs, one_rank: Ranks, reference: Path, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path / "run", compile=True, **cut(ROWS_PER_STEP, 1))
    assert one_rank(train_and_count_breaks, flags) == [0]
    assert_same_training(tmp_path / "run", reference, tolerance=TOLERANCE)
