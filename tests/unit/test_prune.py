"""A pruned checkpoint holds what stays of the old one, entry by entry, and takes its place or not at all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srde_ds.checkpoint.prune import prune_checkpoint
from srde_ds.checkpoint.resume import (
    find_checkpoint,
    load_common_tensors,
    load_rank_state,
    load_run_state,
    verify_checkpoint,
)
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.config import ModelConfig
from srde_ds.errors import SRDEError
from srde_ds.export.weights import export_weights
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.base import load_base
from srde_ds.model.merging import expert_delta
from srde_ds.utils.together import Collectives
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.schema import support_hash
from tests.checkpoint_helpers import ALONE, cut, names, on_ranks, save
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens
from tests.unit.test_checkpoint_save import Kill, Killed

D, F, E = 32, 96, 3
OLD, NEW = 12 / F, 5 / F
KINDS = ("master", "momentum_buffer", "exp_avg", "exp_avg_sq")
ATOMS: list[dict[str, Any]] = [{"num_atoms": 0}, {"num_atoms": 4}, {"num_atoms": 4, "atom_mixing": "softmax"}]
FORMS = [
    {"granularity": granularity, "support_scope": scope} | atoms
    for granularity in ("neuron", "element")
    for scope in ("shared", "per_expert")
    for atoms in ATOMS
]
FORMS += [{"granularity": "neuron", "support_scope": "shared", "neuron_parts": 2} | atoms for atoms in ATOMS]
BLOCKS: list[dict[str, Any]] = [
    {"granularity": "block", "support_scope": scope, "num_atoms": 0} for scope in ("shared", "per_expert")
]
Tensors = dict[tuple[str, str], Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def unpruned(base: Path, **form: Any) -> SRDEModel:
    return randomize(tiny_srde(base=load_base(base, dtype=torch.float32), density=OLD, **form))


def state_of(model: SRDEModel) -> Tensors:
    """The model's masters, and random optimizer state."""
    generator = torch.Generator().manual_seed(7)
    masters = {name: parameter.detach().clone() for name, parameter in model.trainable_parameters()}
    return {
        (kind, name): tensor if kind == "master" else torch.randn(tensor.shape, generator=generator)
        for name, tensor in masters.items()
        for kind in KINDS
    }


def save_run(model: SRDEModel, run: Path, ranks: Collectives = ALONE, *, density: float = NEW) -> Path:
    pieces = cut(state_of(model), ranks.world_size)[ranks.rank]
    state = {
        "step": 5,
        "config": {"adapter": {"density": density}},
        "adapter": model.metadata().to_dict(),
        "probe_loss": 1.5,
    }
    supports = {name: tensor for name, tensor in model.adapter_tensors().items() if name.endswith(".support")}
    common = supports | {"expert_share": torch.full((2, E), 1 / 3), "layers.0.router_bias": torch.ones(E)}
    return save(run, 5, ranks, slices=pieces, rank_state={"rng": ranks.rank}, run_state=state, common_tensors=common)


def prune(folder: Path, density: float = NEW, ranks: Collectives = ALONE, **options: Any) -> Path:
    return prune_checkpoint(folder, density, ranks=ranks, keep=2, **options)


def loaded_state(folder: Path) -> Tensors:
    index = ShardIndex(folder)
    return {key: index.tensor(*key) for key in index.shapes}


def dense_deltas(model: SRDEModel, layer: int) -> Tensor:
    """[E, 3, F, D] float64: each expert's change of gate, up and (transposed) down."""
    module = model.layers[layer]
    dense = torch.zeros(E, 3, F, D, dtype=torch.float64)
    for expert in range(E):
        delta = expert_delta(module.deltas.whole().detach().double(), expert, module.granularity)
        support = (module.support if module.support.dim() == 1 else module.support[expert]).long()
        if module.granularity == "neuron":
            dense[expert, :, support] = delta.permute(1, 2, 0)
        else:
            flat = torch.zeros(3 * F * D, dtype=torch.float64).index_put((support,), delta)
            gate, up, down = flat.split(F * D)
            dense[expert] = torch.stack([gate.view(F, D), up.view(F, D), down.view(D, F).T])
    return dense


def support_rows(support: Tensor) -> list[list[int]]:
    return [row.tolist() for row in (support.expand(E, -1) if support.dim() == 1 else support)]


def best(strength: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(strength)), key=lambda position: (-strength[position], position))[:keep])


def expected_positions(model: SRDEModel, layer: int, keep: int) -> list[list[int]]:
    """Of each expert: from the dense deltas alone."""
    config, dense = model.config, dense_deltas(model, layer)
    rows = support_rows(model.layers[layer].support)
    if config.granularity == "neuron":
        entries = dense.square().sum((1, 3)).sqrt()  # [E, F]
    else:
        entries = torch.stack([torch.cat([d[0].flatten(), d[1].flatten(), d[2].T.flatten()]) for d in dense]).abs()
    strength = torch.stack([entries[expert][row] for expert, row in enumerate(rows)])
    if config.support_scope == "shared" or config.num_atoms:
        strength = strength.square().sum(0).sqrt().expand(E, -1)
    return [best(row.tolist(), keep) for row in strength]


def entry(tensor: Tensor, kind: str, granularity: str, owner: int, position: int) -> Tensor:
    """What a stored tensor holds of an expert (or atom) at a position of the support."""
    if granularity == "neuron":
        return tensor[owner, :, :, position] if kind == "importance" else tensor[:, 3 * owner : 3 * owner + 3, position]
    return tensor[position, 0, owner] if kind == "atoms" else tensor[owner, position]


@pytest.mark.parametrize("form", FORMS)
def test_values_and_optimizer_state_of_the_largest_deltas_stay(
    base: Path, tmp_path: Path, form: dict[str, Any]
) -> None:
    model = unpruned(base, **form)
    folder = prune(save_run(model, tmp_path))
    old, new, common = state_of(model), loaded_state(folder), load_common_tensors(folder)
    assert new.keys() == old.keys()
    parts = form.get("neuron_parts", 1)
    keep = round(NEW * parts * F) if form["granularity"] == "neuron" else round(NEW * 3 * F * D)
    for layer in range(2):
        positions = expected_positions(model, layer, keep)
        before = support_rows(model.layers[layer].support)
        kept = [[before[expert][position] for position in positions[expert]] for expert in range(E)]
        support = common[f"layers.{layer}.support"]
        assert support.dtype == torch.int32 and support.dim() == (1 if form["support_scope"] == "shared" else 2)
        assert support_rows(support) == kept
        assert all(row == sorted(row) for row in kept)
        for kind, name in old:
            part = name.rpartition(".")[2]
            if not name.startswith(f"layers.{layer}."):
                continue
            if part in ("mixing", "weight"):
                assert torch.equal(new[kind, name], old[kind, name])
                continue
            for owner in range(4 if part == "atoms" else E):
                where = positions[0 if part == "atoms" else owner]
                for j in (0, 1, keep // 2, keep - 1):
                    found = entry(new[kind, name], part, form["granularity"], owner, j)
                    assert torch.equal(found, entry(old[kind, name], part, form["granularity"], owner, where[j])), name


@pytest.mark.parametrize("form", [*FORMS, *BLOCKS])
def test_the_pruned_model_is_the_old_one_without_the_dropped_entries(
    base: Path, tmp_path: Path, form: dict[str, Any]
) -> None:
    model = unpruned(base, **form)
    folder = prune(save_run(model, tmp_path))
    pruned = load_adapter(export_weights(folder, tmp_path / "weights"))
    unlike = (pruned(tokens()).logits - model(tokens()).logits).abs().max()
    for layer, module in enumerate(model.layers):
        kept, before = support_rows(pruned.layers[layer].support), support_rows(module.support)
        for expert in range(E):
            dropped = [position for position, index in enumerate(before[expert]) if index not in kept[expert]]
            assert len(dropped) == len(before[expert]) - len(kept[expert]) > 0
            bank = module.deltas
            with torch.no_grad():
                if form["num_atoms"]:
                    bank.importance[expert, ..., dropped] = -torch.inf  # its factor becomes zero
                elif form["granularity"] == "neuron":
                    bank.free[:, 3 * expert : 3 * expert + 3, dropped] = 0
                elif form["granularity"] == "block":
                    bank.free[expert].view(-1, 256)[dropped] = 0
                else:
                    bank.free[expert, dropped] = 0
    torch.testing.assert_close(pruned(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert unlike > 1e-2


def test_the_call_in_the_documentation_prunes(base: Path, tmp_path: Path) -> None:
    folder = save_run(unpruned(base), tmp_path)
    page = (Path(__file__).parents[2] / "docs/curriculum.md").read_text(encoding="utf-8")
    [call] = [block.partition("```")[0] for block in page.split("```python\n") if "prune_checkpoint(" in block]
    exec(call.replace("runs/first/checkpoint-500", str(folder)).replace("0.005", str(NEW)), {})
    assert load_adapter(export_weights(folder, tmp_path / "weights")).config.density == NEW


def test_of_equal_deltas_the_lower_position_stays(base: Path, tmp_path: Path) -> None:
    model = unpruned(base)
    with torch.no_grad():
        for layer in model.layers:
            layer.deltas.free.zero_()
        model.layers[0].deltas.free[:, :, 7] = 1
    folder = prune(save_run(model, tmp_path))
    common = load_common_tensors(folder)
    old = [layer.support.tolist() for layer in model.layers]
    assert common["layers.0.support"].tolist() == [*old[0][:4], old[0][7]]
    assert common["layers.1.support"].tolist() == old[1][:5]


def test_the_rest_of_the_checkpoint_stays(base: Path, tmp_path: Path) -> None:
    model = unpruned(base)
    folder = save_run(model, tmp_path)
    before, common = load_run_state(folder), load_common_tensors(folder)
    assert prune(folder) == folder == find_checkpoint("latest", tmp_path)
    assert names(tmp_path) == ["checkpoint-5", "latest"]
    after = load_run_state(folder)
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {"adapter", "probe_loss"}
    assert after["probe_loss"] is None
    metadata, old = AdapterMetadata.from_dict(after["adapter"]), model.metadata()
    supports = [load_common_tensors(folder)[f"layers.{layer}.support"] for layer in range(2)]
    assert metadata == replace(old, config=replace(old.config, density=NEW), support_hash=support_hash(supports))
    for name in ("expert_share", "layers.0.router_bias"):
        assert torch.equal(load_common_tensors(folder)[name], common[name])
    assert verify_checkpoint(folder)["step"] == 5


@pytest.mark.parametrize("pruned_by", [1, 2, 3, 4])
def test_any_number_of_ranks_prunes_what_any_other_saved(base: Path, tmp_path: Path, pruned_by: int) -> None:
    model = unpruned(base, support_scope="per_expert")
    expected = prune(save_run(model, tmp_path / "one"))
    [folder] = set(on_ranks(3, lambda ranks: save_run(model, tmp_path / "three", ranks)))
    assert on_ranks(pruned_by, lambda ranks: prune(folder, ranks=ranks)) == [folder] * pruned_by
    assert verify_checkpoint(folder)["world_size"] == 3
    assert [load_rank_state(folder, rank) for rank in range(3)] == [{"rng": rank} for rank in range(3)]
    assert load_run_state(folder) == load_run_state(expected)
    found, wanted = loaded_state(folder), loaded_state(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    commons = load_common_tensors(folder), load_common_tensors(expected)
    assert all(torch.equal(commons[0][name], commons[1][name]) for name in commons[1])


# --- learned supports ------------------------------------------------------------------------------------------------

LEARNED = [
    {"granularity": "block", "support_scope": "shared"},
    {"granularity": "block", "support_scope": "per_expert"},
    {"granularity": "neuron", "support_scope": "shared"},
    {"granularity": "neuron", "support_scope": "per_expert"},
    {"granularity": "neuron", "support_scope": "shared", "num_atoms": 4},
    {"granularity": "element", "support_scope": "shared", "num_atoms": 4},
    {"granularity": "element", "support_scope": "per_expert"},
]


def learning(base: Path, **form: Any) -> SRDEModel:
    return unpruned(base, support_strategy="learned", target_density=NEW, **form)


@pytest.mark.parametrize("form", LEARNED)
def test_learned_scores_decide_and_go(base: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    """Pruned, and exported without being pruned, it is the model of eval mode."""
    model = learning(base, **form)
    folder = save_run(model, tmp_path)
    early = load_adapter(export_weights(folder, tmp_path / "early"))
    prune(folder)
    assert {key for key in state_of(model) if not key[1].endswith(".scores")} == loaded_state(folder).keys()
    late = load_adapter(export_weights(folder, tmp_path / "late"))
    assert early.metadata() == late.metadata()
    for name, tensor in early.adapter_tensors().items():
        assert torch.equal(tensor, late.adapter_tensors()[name]), name
    torch.testing.assert_close(late(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)
    for layer, module in enumerate(model.layers):
        block = 64 if form["granularity"] == "element" else 1
        keep = late.layers[layer].support.shape[-1]
        for row, scores in enumerate(module.deltas.scores.detach()):
            entries = scores.repeat_interleave(block)[: module.support.shape[-1]]
            kept = support_rows(late.layers[layer].support)[row]
            positions = [support_rows(module.support)[row].index(index) for index in kept]
            assert positions == best(entries.tolist(), keep)


# --- failures --------------------------------------------------------------------------------------------------------


def density_of(folder: Path) -> float:
    return float(load_run_state(folder)["adapter"]["config"]["density"])


def assert_unpruned(run: Path) -> None:
    folder = find_checkpoint("latest", run)
    assert density_of(folder) == OLD and verify_checkpoint(folder)
    assert names(run) == ["checkpoint-5", "latest"]


@pytest.mark.parametrize("density", [OLD, OLD + 1e-4, 0.5])
def test_supports_that_would_not_shrink_are_refused(base: Path, tmp_path: Path, density: float) -> None:
    folder = save_run(unpruned(base), tmp_path)
    with pytest.raises(
        SRDEError, match=r"density=0\.\d+: the supports would have \d+ entries, .* have 12, .*lower density"
    ):
        prune(folder, density)
    assert_unpruned(tmp_path)


def test_a_flipped_bit_stops_every_rank(base: Path, tmp_path: Path) -> None:
    model = unpruned(base)
    [folder] = set(on_ranks(2, lambda ranks: save_run(model, tmp_path, ranks)))
    shard = folder / "shard-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    listing = {path.name: path.read_bytes() for path in folder.iterdir()}
    errors = on_ranks(2, lambda ranks: prune(folder, ranks=ranks))
    assert [type(error) for error in errors] == [SRDEError, SRDEError]
    assert all("'shard-00001.safetensors' does not match its sha256" in str(error) for error in errors)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == listing
    with pytest.raises(SRDEError, match=r"shard-00001\.safetensors' does not match its sha256"):
        prune(folder)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save_run(unpruned(base), tmp_path / "run")
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(SRDEError, match=r"supports have \[12\] entries, but with base .*other' they would have \[8\]"):
        prune(folder, base=ModelConfig(model_name=str(tmp_path / "other")))
    with pytest.raises(SRDEError, match="cannot load the model"):
        prune(folder, base=ModelConfig(model_name=str(tmp_path / "nowhere")))
    assert_unpruned(tmp_path / "run")
    moved = base.rename(base.with_name("moved"))
    try:
        with pytest.raises(SRDEError, match="cannot load the model"):
            prune(folder)
        assert density_of(prune(folder, base=ModelConfig(model_name=str(moved)))) == NEW
    finally:
        moved.rename(base)


def test_a_folder_of_another_name_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save_run(unpruned(base), tmp_path).rename(tmp_path / "best")
    with pytest.raises(SRDEError, match="pruning needs a folder called 'checkpoint-5'"):
        prune(folder)


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match="has no 'adapter'"):
        prune(save(tmp_path, 5))


def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new_one(base: Path, tmp_path: Path) -> None:
    model = unpruned(base)
    with pytest.MonkeyPatch.context() as patch:
        folder = save_run(model, tmp_path / "count")
        counter = Kill(patch, math.inf)
        prune(folder)
    assert counter.count > 12
    found = []
    for at in range(1, counter.count + 1):
        run = tmp_path / str(at)
        folder = save_run(model, run)
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, at)
            with pytest.raises(Killed):
                prune(folder)
        latest = find_checkpoint("latest", run)
        found.append(density_of(latest))
        assert loaded_state(latest)["master", "layers.0.deltas.free"].shape[-1] == round(found[-1] * F)
        if found[-1] == OLD:  # the next attempt succeeds, also from the folder that had stepped aside
            assert density_of(prune(latest)) == NEW
            assert names(run) == ["checkpoint-5", "latest"]
    assert found == sorted(found, reverse=True) and set(found) == {OLD, NEW}
