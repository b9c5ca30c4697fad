"""Float32 against bfloat16 on this CPU: forward and backward of the quick start's feed-forward block, one thread.

python -m benchmarks.cpu_dtype      # prints a table, writes a record a machine to benchmarks/results/cpu_dtype.json
"""

import json
from pathlib import Path

import torch

from benchmarks.tables import measured_on
from launch.fastest_dtype import seconds  # what the quick start measures, not a copy of it
from srde_ds.utils.dtypes import dtype_name

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    torch.set_num_threads(1)
    timings = {dtype_name(dtype): seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = timings["bfloat16"] / timings["float32"]
    for dtype, value in timings.items():
        print(f"{dtype:<10}{value:>8.3f} s")
    print(f"bfloat16 / float32: {ratio:.2f}")
    here = measured_on()
    record = {"seconds": timings, "bfloat16_over_float32": ratio, "environment": here}
    target = ROOT / "benchmarks/results/cpu_dtype.json"
    records = json.loads(target.read_text()) | {here["machine"]: record}
    target.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
