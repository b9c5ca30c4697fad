"""Loading, identifying and searching the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import IDENTITY_FIELDS, Sharding, base_identity, identity_hash, load_base
from srde_ds.model.feed_forward import find_feed_forward, verify_block
from tests.helpers import adapter_config, gemma4, tiny_llama, tiny_srde, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(path)
    return path


def test_load_base_is_frozen_and_exact(folder: Path) -> None:
    base = load_base(str(folder), dtype=torch.float32)
    assert not base.training and not any(p.requires_grad for p in base.parameters())
    saved = tiny_llama(dtype=torch.bfloat16).state_dict()
    assert {name: p.float().sum().item() for name, p in saved.items()} == {
        name: p.sum().item() for name, p in base.state_dict().items()
    }
    assert {p.dtype for p in base.parameters()} == {torch.float32}


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    for load in (lambda p: load_base(p, dtype=torch.float32), load_tokenizer):
        with pytest.raises(SRDEError, match=r"model_name='.*nowhere': cannot load the (model|tokenizer)"):
            load(str(tmp_path / "nowhere"))


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    state = {name: p for name, p in base.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    base.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(SRDEError, match=r"lack 1 weights of LlamaForCausalLM, such as .*layers\.1\.mlp\.up_proj"):
        load_base(str(tmp_path), dtype=torch.float32)


def test_identity_does_not_depend_on_the_dtype_of_the_load(folder: Path) -> None:
    wide, narrow = (base_identity(load_base(folder, dtype=d)) for d in (torch.float32, torch.bfloat16))
    assert wide == narrow == {"name": str(folder), "architecture": "LlamaForCausalLM", "hash": wide["hash"]}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_identity_sees_changed_weights_and_shapes(name: str) -> None:
    base = tiny_llama()
    before = base_identity(base)["hash"]
    assert base_identity(tiny_llama(num_attention_heads=2))["hash"] != before
    base.get_parameter(name).data[0, 0] += 1
    assert base_identity(base)["hash"] != before


def test_identity_of_a_base_whose_layers_differ_in_their_heads() -> None:
    configuration = gemma4()
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        assert configuration.head_dim  # transformers lets only layers be asked
    hashes = [identity_hash(c, []) for c in (configuration, gemma4(), gemma4(global_head_dim=32), gemma4(head_dim=4))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    plain = tiny_llama().config  # of a base whose layers are alike, the hash is as it has always been
    fields = {name: getattr(plain, name, None) for name in IDENTITY_FIELDS}
    assert identity_hash(plain, []) == hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def test_a_base_that_carries_experts_is_refused() -> None:
    model = tiny_srde()
    for use in (base_identity, find_feed_forward):
        with pytest.raises(SRDEError, match="already carries experts"):
            use(model.base)


def test_sharded_weights_are_read_inside_gather_only() -> None:
    """ZeRO-3 as seen from here: parameters are empty, their shape is in ds_shape, a context fills some of them."""
    whole, base = tiny_srde(), tiny_llama()
    values = {}
    for parameter in base.parameters():
        values[parameter] = parameter.data
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    largest = 0

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        nonlocal largest
        largest = max(largest, len(parameters))
        for parameter in parameters:
            parameter.data = values[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    model = add_experts(base, adapter_config(), expert_names=["a", "b", "c"], seed=0, sharding=Sharding(gather))
    assert all(parameter.numel() == 0 for parameter in values)
    assert largest <= 9  # the parameters of one decoder layer
    for parameter, value in values.items():
        parameter.data = value
    assert model.base_identity == whole.base_identity
    assert all(torch.equal(a.support, b.support) for a, b in zip(model.layers, whole.layers, strict=True))
    assert torch.equal(model(tokens()).logits, whole(tokens()).logits)


class Block(nn.Module):
    """A gated block whose attributes are named and ordered at will."""

    def __init__(self, names: tuple[str, str, str], sizes: tuple[int, int]) -> None:
        super().__init__()
        hidden, intermediate = sizes
        for name in sorted(names):
            is_down = name == names[2]
            setattr(self, name, nn.Linear(intermediate if is_down else hidden, hidden if is_down else intermediate))
        self.names = names
        self.act = nn.functional.silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


@pytest.mark.parametrize("sizes", [(8, 12), (8, 8)])
@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("b", "a", "c"), ("up", "gate", "down"), ("down", "x", "gate")])
def test_probing_finds_the_roles_whatever_the_names(names: tuple[str, str, str], sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    roles = verify_block(Block(names, sizes), sizes[0], dtype=torch.float32)
    assert roles == {"gate": names[0], "up": names[1], "down": names[2], "act": "act"}


def test_where_probing_cannot_tell_the_names_decide() -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    block = Block(names, (8, 8))
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    assert verify_block(block, 8, dtype=torch.float32) == dict(zip(("gate", "up", "down"), names, strict=True)) | {
        "act": "act"
    }


def test_a_block_that_computes_something_else_is_refused() -> None:
    class Scaled(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(SRDEError, match=r"block: Scaled \(.*a Linear 8 -> 12.*\) looks like a gated"):
        verify_block(Scaled(("a", "b", "c"), (8, 12)), 8, dtype=torch.float32)
