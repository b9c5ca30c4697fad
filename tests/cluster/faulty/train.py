"""launch/train.py, with faults in a rank: when `output_dir/fault-RANK` appears, it does once what the file says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[3]))

from srde_ds.cli.main import main
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.output import SRDEOutput
from srde_ds.training import consistency
from srde_ds.utils.environment import package_versions

FAULT = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / f"fault-{os.environ['RANK']}"


def ordered(*kinds: str) -> str | None:
    kind = FAULT.read_text() if FAULT.exists() else ""
    if kind not in kinds:
        return None
    FAULT.unlink()
    return kind


def with_faults(forward: Any) -> Any:
    def faulty(model: SRDEModel, *args: Any, **kwargs: Any) -> SRDEOutput:
        kind = ordered("raise", "stall")
        if kind == "raise":
            raise RuntimeError("out of luck")
        if kind == "stall":
            time.sleep(600)
        output: SRDEOutput = forward(model, *args, **kwargs)
        return output

    return faulty


if __name__ == "__main__":
    SRDEModel.forward = with_faults(SRDEModel.forward)  # type: ignore[method-assign]
    if ordered("software"):
        versions = package_versions() | {"transformers": "0.0.1"}
        patch.object(consistency, "package_versions", lambda: versions).start()
    sys.exit(main(["train", *sys.argv[1:]]))
