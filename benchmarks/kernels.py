"""Registers and spills of the experts' Triton kernels, compiled for an H100 without one.

python -m benchmarks.kernels     # prints a table, writes benchmarks/results/kernels.json
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.tables import markdown, measured_on
from srde_ds.model.expert_kernels import experts_backward, experts_forward
from srde_ds.model.fused import DENSE_BLOCK, GELU_TANH, LAUNCH, SILU, WIDEST_BLOCK, block_size

CAPABILITY = 90
POINTERS = {"index": "*i64", "neurons": "*i32", "weights": "*fp32", "of_weights": "*fp32"}
NEURONS = (16, 164, WIDEST_BLOCK)  # of an expert: SmolLM2 and Ministral-3-14B at 1 %, and the widest


def compiled(kernel: Any, constants: dict[str, int | bool], dtype: str) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, as ptxas reports them."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else "i32" if name in ("F", "m") else POINTERS.get(name, f"*{dtype}")
        for name in names
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=LAUNCH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(made.asm["ptx"])
        command = [get_ptxas(CAPABILITY).path, "-v", f"--gpu-name=sm_{CAPABILITY}a", str(path), "-o", f"{folder}/out"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spilled is not None and registers is not None, report
    return {
        "registers": int(registers[1]),
        "spill_stores": int(spilled[1]),
        "spill_loads": int(spilled[2]),
        "shared_bytes": made.metadata.shared,
    }


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, kernel in (("forward", experts_forward), ("backward", experts_backward)):
        for shared in (True, False):
            for kind, activation in ((SILU, "silu"), (GELU_TANH, "gelu_tanh")):
                for neurons in NEURONS:
                    constants: dict[str, int | bool] = {
                        "X": 6,
                        "K": 2,
                        "SHARED": shared,
                        "BY_EXPERT": True,
                        "KIND": kind,
                        "BLOCK": block_size(neurons),
                    }
                    constants |= {"DENSE": DENSE_BLOCK} if name == "backward" else {}
                    case = {"kernel": name, "shared_support": shared, "activation": activation, "neurons": neurons}
                    rows.append(case | compiled(kernel, constants, "bf16"))
    assert not any(row["spill_stores"] for row in rows), "a kernel spills registers"
    print(markdown(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    result = {"target": f"sm_{CAPABILITY}a", "triton": triton.__version__, "rows": rows, "environment": measured_on()}
    target = Path(__file__).resolve().parent / "results/kernels.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
