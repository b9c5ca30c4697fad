"""The loss of the deltas' size has one gradient, however the batch and the experts are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.config import resolve
from tests.distributed.engine_helpers import run_steps, state, whole
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, assert_close, cut
from tests.helpers import randomize

ROWS = 4


def state_after_a_step(flags: dict[str, Any], size_weight: float) -> list[TensorSlice]:
    """From random deltas."""
    from srde_ds.distributed.engine import build_engine, build_model
    from srde_ds.distributed.processes import start_processes
    from srde_ds.model.policy import RoutingPolicy
    from srde_ds.training.balancing import auxiliary_weights

    config = resolve({}, flags | {"delta_size_weight": size_weight})
    topology = start_processes(60)
    model = randomize(build_model(config, topology))
    engine = build_engine(model, config, topology)
    # The router's losses have no scale here, so only the size's counts.
    weights = auxiliary_weights(config.losses, config.training.gradient_accumulation_steps)
    run_steps(engine, config, topology, policy=RoutingPolicy(auxiliary_weights=weights))
    return state(engine)


@pytest.mark.parametrize("form", [{"neuron_parts": 1}, {"neuron_parts": 3}, {"num_atoms": 4, "atom_mixing": "softmax"}])
def test_the_size_of_deltas_weighs_the_same_on_any_number_of_ranks(
    inputs: Inputs,
    one_rank: Ranks,
    two_ranks: Ranks,
    four_ranks: Ranks,
    tmp_path: Path,
    form: dict[str, Any],
) -> None:
    """Three experts: expert-parallel size 2 leaves a slot empty."""
    ranks = {1: one_rank, 2: two_ranks, 4: four_ranks}

    def gradients(world_size: int, expert_parallel_size: int = 1, transport: str = "auto", weight: float = 20.0) -> Any:
        """AdamW's first moments, the gradient times 1 - beta1."""
        flags = inputs.flags(
            tmp_path,
            use_muon=False,
            max_grad_norm=0.0,
            **cut(ROWS, world_size),
            expert_parallel_size=expert_parallel_size,
            expert_transport=transport,
            **form,
        )
        return whole(ranks[world_size](state_after_a_step, flags, weight), "exp_avg")

    alone, without = gradients(1), gradients(1, weight=0.0)
    name = "layers.1.deltas." + ("atoms" if "num_atoms" in form else "free")
    assert float((alone[name] - without[name]).norm()) > 0.3 * float(without[name].norm())
    for world_size, experts, transport in [(2, 1, "auto"), (2, 2, "tokens"), (4, 2, "tokens"), (4, 2, "deltas")]:
        found = gradients(world_size, experts, transport)
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            assert_close(tensor, alone[name], 1e-5, f"{world_size} ranks, {experts} of experts, {transport}: {name}")
