"""How much memory does `srde-ds convert` take? Peak resident memory of the verb for a base of random weights on disk.

python -m benchmarks.convert_memory      # prints a table, writes benchmarks/results/convert_memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.tables import measured_on
from srde_ds.model.adapter import add_experts
from tests.helpers import adapter_config

ROOT = Path(__file__).resolve().parents[1]

# Imports what the verb imports, then nothing: the part of the memory that no base changes.
BARE = "import srde_ds.export.command"
VERB = "import sys; from srde_ds.cli.main import main; sys.exit(main(sys.argv[1:]))"
NAMES = ["a", "b", "c"]


def make_model(folder: Path, layers: int) -> None:
    """A base of `layers` layers, D 1024, F 4096, in bfloat16 and files of 256 MB, and experts for it."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config)
    base.to(torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="256MB")
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).eval()
    model = add_experts(base, adapter_config(density=0.01), expert_names=NAMES, seed=0)
    model.save_pretrained(folder / "adapter")


def measured(program: str, *arguments: str) -> tuple[float, float]:
    """Peak resident MiB of a Python process, and its seconds."""
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.perf_counter()
    command = [sys.executable, "-c", watch, sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own, whose memory goes with it.
        command = [sys.executable, "-m", "benchmarks.convert_memory", "--make", scratch, str(options.layers)]
        subprocess.run(command, cwd=ROOT, check=True)
        files = list((folder / "base").glob("*.safetensors"))
        sizes = {
            "base": sum(f.stat().st_size for f in files) / 2**20,
            "largest_file": max(f.stat().st_size for f in files) / 2**20,
        }
        bare, _ = measured(BARE)
        rows: list[dict[str, Any]] = []
        for to, extra in (("dense", ["--expert", "a"]), ("moe", [])):
            arguments = ["convert", "--checkpoint", str(folder / "adapter"), "--to", to, *extra]
            peak, seconds = measured(VERB, *arguments, "--output", str(folder / to))
            rows.append({"to": to, "peak_mib": peak, "above_imports_mib": peak - bare, "seconds": seconds})
    print(f"base {sizes['base']:.0f} MiB, largest file {sizes['largest_file']:.0f} MiB; imports alone {bare:.0f} MiB")
    print(f"{'to':<6} {'peak MiB':>9} {'above imports':>14} {'seconds':>8}")
    for row in rows:
        print(f"{row['to']:<6} {row['peak_mib']:>9.0f} {row['above_imports_mib']:>14.0f} {row['seconds']:>8.0f}")
    kept = measured_on()
    record = {"sizes_mib": sizes, "imports_mib": bare, "rows": rows, "environment": kept}
    (ROOT / "benchmarks/results/convert_memory.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_model(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
