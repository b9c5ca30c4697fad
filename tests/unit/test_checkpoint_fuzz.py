"""Random damage to the JSON files of a checkpoint: it is read right or refused, soon and in little memory."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.checkpoint.layout import MAX_JSON_BYTES, content_hash
from srde_ds.checkpoint.resume import (
    find_checkpoint,
    load_common_tensors,
    load_rank_state,
    load_run_state,
    verify_checkpoint,
)
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.config import Config
from srde_ds.errors import SRDEError
from srde_ds.training.changed_options import changes
from srde_ds.training.checkpointing import check_saved
from srde_ds.training.random_state import random_state, set_random_state
from srde_ds.utils.files import file_hash
from tests.checkpoint_helpers import blank, cut, make_tensors, save

CASES = 250
MOST_SECONDS, MOST_MIB = 30.0, 300  # of the processor, for all cases of a test; they take some two

VALUES = [
    "null", "true", "-1", "0", "1.5", "1e999", "NaN", "9007199254740992", "-9223372036854775808", "1" + 30 * "0", "[]",
    "{}",
    '""', '"../../etc/passwd"', '"/dev/zero"', '"\\u0000"', '"\\ud800"', '"checkpoint-1"', '"ff"',
    '{"bytes":0,"sha256":""}', "[" * 500 + "]" * 500, "[" + "[]," * 999 + "[]]", json.dumps("x" * 10_000),
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON tree can be changed: the path to each entry, five steps long at most."""
    if len(path) == 5:
        return []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def mutated(tree: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy with one to three entries replaced, removed, renamed, or exchanged with another."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.randint(1, 3)):
        *path, key = draw.choice(places(tree))
        node: Any = tree
        for step in path:
            node = node[step]
        match draw.randrange(4):
            case 0:
                node[key] = json.loads(draw.choice(VALUES))
            case 1:
                del node[key]
            case 2 if isinstance(node, dict):
                node[draw.choice(["x", "../run.json", "shard-00001.safetensors", "", "\0"])] = node.pop(key)
            case _:
                other = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
                node[key], node[other] = node[other], node[key]
    return tree


def torn(content: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled, or the end cut off."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(damaged))
        stop = min(len(damaged), start + draw.choice([1, 1, 2, 40]))
        damaged[start:stop] = draw.choice([b"", damaged[start:stop] * 2, draw.randbytes(stop - start), b"[" * 9000])
        if not damaged:
            break
    return bytes(damaged)


def read_all(folder: Path) -> None:
    """All that a resuming run reads."""
    found = find_checkpoint("latest", folder.parent)
    values, common = load_run_state(found), load_common_tensors(found)
    check_saved(values, common, found)
    changes(values["config"], Config())
    set_random_state(load_rank_state(found, 0).get("random_state"))
    ShardIndex(found).read(blank(cut(make_tensors(), 1)[0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that holds what a run's does, as far as it is checked before a model is built."""
    state = {
        "step": 4,
        "tokens": 9,
        "dataset": "ab",
        "rows_per_step": 8,
        "probe_loss": 0.5,
        "unlock_order": [1, 0],
        "config": {"adapter": {"num_experts": 2}, "data": {"domains": ["a", "b"]}, "training": {"seed": 1}},
        "adapter": {
            "config": {"density": 0.5},
            "expert_names": ["a", "b"],
            "support_hash": "cd",
            "base": {"hash": "ef"},
        },
    }
    return save(tmp_path, 4, run_state=state, rank_state={"random_state": random_state()})


def refused(folder: Path, cases: list[Callable[[], None]]) -> int:
    """How many of the damages are refused; each is undone before the next."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    generator = torch.get_rng_state()
    started, peak, count = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for damage in cases:
        damage()
        try:
            read_all(folder)
        except SRDEError as error:
            count += 1
            assert "\n" not in str(error)
        for path, content in before.items():
            path.write_bytes(content)
    torch.set_rng_state(generator)
    assert time.process_time() - started < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < MOST_MIB
    read_all(folder)
    return count


def rehash(path: Path, manifest: dict[str, Any]) -> None:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    path.write_text(json.dumps(content | {"sha256": content_hash(content)}))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put a file in a checkpoint as somebody would who can hash: the manifest agrees with it."""
    (folder / name).write_bytes(content)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = {"bytes": len(content), "sha256": file_hash(folder / name)}
    rehash(path, manifest)


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "rank-00000.json", "common.safetensors"])
def test_torn_files_are_refused(folder: Path, name: str) -> None:
    draw, path = random.Random(name), folder / name
    content = path.read_bytes()
    damages = [damaged for _ in range(CASES) if (damaged := torn(content, draw)) != content]
    # In the manifest white space may change: what it says is hashed, not how.
    assert refused(folder, [lambda d=d: path.write_bytes(d) for d in damages]) > 0.95 * len(damages)  # type: ignore[misc]


def test_forged_manifests_are_refused_or_say_the_truth(folder: Path) -> None:
    draw, path = random.Random(1), folder / "manifest.json"
    manifest = json.loads(path.read_bytes())

    def damage() -> None:
        rehash(path, mutated(manifest, draw))

    # An attacker may say another step or time.
    assert refused(folder, [damage] * CASES) > 0.7 * CASES


@pytest.mark.parametrize(("name", "share"), [("run.json", 0.4), ("rank-00000.json", 0.5)])
def test_forged_states_are_refused_or_of_the_right_form(folder: Path, name: str, share: float) -> None:
    draw = random.Random(name)
    state = json.loads((folder / name).read_bytes())

    def damage() -> None:
        forge(folder, name, json.dumps(mutated(state, draw)).encode())

    # The rest are other values of the right types: nothing tells them from those of a run.
    assert refused(folder, [damage] * CASES) > share * CASES


@pytest.mark.parametrize("unit", [b"[", b"{},", b"0,", b'"\\ud800",', b'{"a":', b"1"])
def test_the_largest_file_that_is_read_takes_bounded_memory(folder: Path, unit: bytes) -> None:
    content = b'{"a": [' + unit * ((MAX_JSON_BYTES - 20) // len(unit)) + b"0]}"

    def damage() -> None:
        (folder / "manifest.json").write_bytes(content)

    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    damage()
    with pytest.raises(SRDEError, match="manifest.json"):
        verify_checkpoint(folder)
    assert time.process_time() - started < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < 3 * MOST_MIB


def test_a_state_of_no_generator_is_refused() -> None:
    good = random_state()["cpu"]
    for text in (None, "", "zz", good[:-2], "ff" * (len(good) // 2)):
        with pytest.raises(SRDEError, match="not the state of random number generators"):
            set_random_state({"cpu": text})
    wrong: tuple[Any, ...] = (None, [], {})
    for states in wrong:
        with pytest.raises(SRDEError, match="not the state of random number generators"):
            set_random_state(states)
