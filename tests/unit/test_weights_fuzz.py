"""Weights files of strangers: each of thousands is refused in one line, or gives a model with finite values."""

from __future__ import annotations

import json
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.weights.file import read_weights, save_weights
from srde_ds.weights.schema import support_hash
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens

TRIES = 1000  # of each kind of damage
SPARE_MEMORY = 512 * 2**20
FORMS: list[dict[str, Any]] = [
    {},
    {"num_atoms": 2, "support_scope": "per_expert"},
    {"granularity": "block"},
    {"granularity": "element", "density": 0.002},
    {"granularity": "element", "density": 0.002, "num_atoms": 2, "support_scope": "per_expert"},
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 4, 2**31, 2**63, 10**18, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "3", "nan", "neuron", "element", "shared", "per_expert", "a\nb", "\x1b[2J", "\u202e", "x" * 5000),
    *([], {}, [[]], {"a": 1}, ["a", "b", "c"], ["a", "a", "b"], ["a", "b", "c\0"], [1, 2, 3], ["a"] * 1000),
]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


class Whole:
    """Good weights in a file, taken apart."""

    def __init__(self, path: Path, form: dict[str, Any]) -> None:
        model = randomize(tiny_srde(base=tiny_llama(), **form))
        save_weights(path, model.adapter_tensors(), model.metadata())
        self.data, self.tensors = path.read_bytes(), load_file(path)
        with safe_open(path, framework="pt") as file:
            self.metadata: dict[str, Any] = json.loads(file.metadata()["srde"])


def odd_metadata(draw: random.Random, whole: Whole, path: Path) -> None:
    """One or two entries replaced, removed, added or nested deeply."""
    values = json.loads(json.dumps(whole.metadata))
    text = None
    for _ in range(draw.choice((1, 1, 2))):
        part = values["config"] if draw.random() < 0.6 and isinstance(values.get("config"), dict) else values
        key = draw.choice([*part, "more", "", "a\nb", "k" * 5000])
        action = draw.random()
        if action < 0.75:
            part[key] = draw.choice(ODD_VALUES)
        elif action < 0.9:
            part.pop(key, None)
        else:
            text = draw.choice(["", "null", "[1]", "{", "[" * 200_000, '{"a":' * 100_000, "1" * 5000, "NaN", '"srde"'])
    save_file(whole.tensors, path, metadata={"srde": json.dumps(values) if text is None else text})


def odd_bytes(draw: random.Random, whole: Whole, path: Path) -> None:
    """Bytes of the header or of the tensors changed, the length of the header changed, or the file cut short."""
    data = bytearray(whole.data)
    end = 8 + int.from_bytes(data[:8], "little")
    action = draw.random()
    if action < 0.7:
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(end if draw.random() < 0.9 else len(data))] = draw.choice((*b'0129{}[],:"-. ', 0, 255))
    elif action < 0.85:
        data[:8] = draw.choice((0, 1, end - 9, end, 10**6, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    else:
        data = data[: draw.randrange(len(data))]
    path.write_bytes(data)


def odd_tensors(draw: random.Random, whole: Whole, path: Path) -> None:
    """Tensors missing, renamed, reshaped, of other dtypes or of odd values; half of the time with a fitting hash."""
    tensors: dict[str, Tensor] = dict(whole.tensors)
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(sorted(tensors) or [""])
        if not name:
            break
        tensor = tensors.pop(name).clone()
        action = draw.random()
        if action < 0.1:
            continue
        if action < 0.2:
            name = draw.choice(
                (name + "x", name.replace("0", "7"), name.replace("layers", "l\n"), name.upper(), "", "a")
            )
        elif action < 0.35:
            tensor = draw.choice(
                (
                    tensor[:-1] if tensor.dim() else tensor[None],
                    tensor.flatten(),
                    tensor[..., None],
                    tensor[..., :0],
                    tensor.flatten()[:1].view(()),
                )
            )
        elif action < 0.5:
            tensor = tensor.to(draw.choice(DTYPES))
        elif tensor.numel():
            flat = tensor.view(-1)
            values = (
                (-1, 0, 1, 95, 96, 2**31 - 1) if tensor.dtype == torch.int32 else (torch.nan, torch.inf, -1e38, 0.0)
            )
            odd = draw.choice(values)
            if tensor.dtype.is_floating_point or isinstance(odd, int):
                flat[draw.randrange(len(flat))] = odd
        tensors[name] = tensor.contiguous()
    metadata = dict(whole.metadata)
    if draw.random() < 0.5:
        supports = [tensor for name, tensor in sorted(tensors.items()) if name.endswith(".support")]
        metadata["support_hash"] = support_hash([tensor.to(torch.int32) for tensor in supports])
    save_file(tensors, path, metadata={"srde": json.dumps(metadata)})


@contextmanager
def bounded_memory(spare: int) -> Iterator[None]:
    """Whatever takes so many bytes more than this process has now fails with another error than an SRDEError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read: Callable[[], Any]) -> str:
    """The kind of refusal, or "" of what was taken; any other exception than an SRDEError of one line fails."""
    try:
        read()
    except SRDEError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2000, message
        return message.partition(":")[2][:30]
    return ""


@pytest.mark.parametrize("damage", [odd_metadata, odd_bytes, odd_tensors])
def test_damaged_weights_are_refused_or_finite(damage: Callable[..., None], tmp_path: Path) -> None:
    draw, path = random.Random(f"seed {damage.__name__}"), tmp_path / "weights.safetensors"
    wholes = [Whole(path, form) for form in FORMS]
    seen: Counter[str] = Counter()
    with bounded_memory(SPARE_MEMORY):
        for number in range(TRIES):
            damage(draw, wholes[number % len(wholes)], path)
            refused = outcome(lambda: read_weights(path))
            if number % 5 == 0:  # what converts refuses the same
                assert outcome(lambda: open_adapter(path)) == refused
            seen[refused] += 1
            if not refused and seen[""] % 3 == 0 and outcome(lambda: check_model(path)):
                seen["another base"] += 1
    assert seen[""] > TRIES / 100 and len(seen) > 10, seen


@torch.no_grad()
def check_model(path: Path) -> None:
    model = load_adapter(path, base=tiny_llama())
    assert all(bool(tensor.isfinite().all()) for tensor in model.adapter_tensors().values())
    assert model(tokens(1, 4)).logits.shape == (1, 4, 101)


def test_claims_take_no_memory(tmp_path: Path) -> None:
    """Sizes in the metadata are compared with the tensors before anything is allocated."""
    path = tmp_path / "weights.safetensors"
    whole = Whole(path, FORMS[0])
    for claim in ({"num_atoms": 10**7}, {"num_experts": 10**7}, {"density": 1.0, "num_atoms": 10**5}):
        metadata = whole.metadata | {"config": whole.metadata["config"] | claim}
        if "num_experts" in claim:
            metadata["expert_names"] = [str(number) for number in range(3)]
        save_file(whole.tensors, path, metadata={"srde": json.dumps(metadata)})
        with bounded_memory(SPARE_MEMORY), pytest.raises(SRDEError):
            load_adapter(path, base=tiny_llama())
