"""Do SRDE's experts train on bases that GPTQModel has quantised with GPTQ and AWQ, as PEFT's LoRA does? On a CPU.

    pip install gptqmodel optimum peft
    python -m benchmarks.packed_bases --folder runs/packed_bases          # results/packed_bases.json

A tiny random model is quantised, loaded by transformers with the kernels in plain torch, and trained on one batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig
from transformers.utils.quantization_config import AwqBackend

from benchmarks.tables import measured_on
from srde_ds.errors import SRDEError
from srde_ds.peft import SRDEConfig
from tests.data_helpers import tiny_tokenizer
from tests.helpers import tiny_llama

RESULT = Path(__file__).resolve().parent / "results/packed_bases.json"
KERNELS = {"gptq": GPTQConfig(bits=4, backend="torch"), "awq": AwqConfig(bits=4, backend=AwqBackend.TORCH_AWQ)}
STEPS = 8


def quantise(base: Path, method: str, folder: Path) -> None:
    gptqmodel = import_module("gptqmodel")  # not installed with the benchmarks
    options = {"gptq": {}, "awq": {"quant_method": "awq", "format": "gemm"}}[method]
    model = gptqmodel.GPTQModel.load(
        str(base), gptqmodel.QuantizeConfig(bits=4, group_size=32, **options), device="cpu"
    )
    words = ["river", "bridge", "town", "valley", "library", "railway", "harbour"]
    rows = [
        " ".join(f"The {words[(i + j) % 7]} is near the {words[(i * j) % 7]}." for j in range(12)) for i in range(96)
    ]
    model.quantize(rows, batch_size=1)
    model.save(str(folder))


def trained(model: Any, ids: torch.Tensor) -> list[float]:
    """The losses of some steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss), 3))
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids).logits
    return found


def tried(load: Callable[[], Any], whole: Any, folder: Path) -> dict[str, Any]:
    """What holds for LoRA and for SRDE on one quantised base; `whole` is the base before."""
    ids = torch.arange(2, 34).reshape(2, 16)
    base = load()
    bare, projection = logits(base, ids), type(base.model.layers[0].mlp.down_proj).__name__
    lora = trained(get_peft_model(load(), LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])), ids)
    experts: dict[str, Any] = {"num_experts": 3, "top_k": 2, "density": 0.05}
    model: Any = get_peft_model(base, SRDEConfig(**experts))
    new = torch.equal(logits(model, ids), bare)
    losses = trained(model, ids)
    after = logits(model, ids)
    with model.disable_adapter():
        disabled = torch.equal(logits(model, ids), bare)
    try:
        model.merge_and_unload(expert="expert_0")
        merging = "done"
    except SRDEError as error:
        merging = str(error)
    model.save_pretrained(str(folder))
    again = PeftModel.from_pretrained(load(), str(folder))
    of_whole: Any = get_peft_model(whole, SRDEConfig(**experts))
    supports = [
        (set(own.support.tolist()), set(other.support.tolist()))
        for own, other in zip(model.srde_model().layers, of_whole.srde_model().layers, strict=True)
    ]
    return {
        "projection": projection,
        "lora_losses": lora,
        "losses": losses,
        "new_experts_change_nothing": new,
        "disabled_it_is_the_base": disabled,
        "loaded_again_the_same": torch.equal(logits(again, ids), after),
        "merging": merging,
        "neurons_that_the_unquantised_base_has_too": [f"{len(own & other)} of {len(own)}" for own, other in supports],
    }


def main(folder: Path) -> None:
    whole = tiny_llama(hidden_size=128, intermediate_size=256, vocab_size=300, max_position_embeddings=256)
    whole.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    record: dict[str, Any] = {name: version(name) for name in ("gptqmodel", "optimum", "peft", "transformers", "torch")}
    for method, kernels in KERNELS.items():
        quantised = folder / method
        quantise(folder / "base", method, quantised)

        def load(place: Path = quantised, kernels: Any = kernels) -> Any:
            return AutoModelForCausalLM.from_pretrained(
                place, quantization_config=kernels, device_map="cpu", dtype=torch.float32, trust_remote_code=False
            )

        plain = AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=False)
        record[method] = tried(load, plain, folder / f"adapter-{method}")
    RESULT.write_text(json.dumps(record | {"measured_on": measured_on()}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    main(parser.parse_args().folder)
