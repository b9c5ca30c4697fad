"""PEFT's own comparison of methods, with SRDE among them.

`python run.py PEFT_CHECKOUT EXPERIMENT [options]` copies the experiment into a checkout of PEFT and starts the
run.py of its `method_comparison/MetaMathQA` with these options, and with SRDE known to PEFT.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = (3, 12)
"""What the harness needs: with an older Python it reports a wrong size of the checkpoint and no error"""


def main(checkout: str, experiment: str, *options: str) -> None:
    harness = Path(checkout) / "method_comparison" / "MetaMathQA"
    if not (harness / "run.py").is_file():
        sys.exit(f"{harness}: no run.py there. Give a checkout of PEFT.")
    source = HERE / "experiments" / "srde" / experiment
    if not source.is_dir():
        known = ", ".join(sorted(path.name for path in source.parent.iterdir()))
        sys.exit(f"experiment '{experiment}': choose one of {known}.")
    if sys.version_info < PYTHON:
        sys.exit(f"Python {sys.version.split()[0]}: PEFT's harness needs {'.'.join(map(str, PYTHON))} or newer.")
    import peft  # late, like srde_ds.peft: a bad argument is told at once

    installed = Path(peft.__file__).parent
    if not installed.resolve().is_relative_to(Path(checkout).resolve()):
        sys.exit(
            f"peft {peft.__version__} is installed in {installed}, but the harness asks git for the branch of the "
            f"installed PEFT. Install the checkout: pip install -e {checkout}"
        )
    place = Path("experiments") / "srde" / experiment
    import srde_ds.peft  # noqa: F401  makes the method known

    shutil.copytree(source, harness / place, dirs_exist_ok=True)
    os.chdir(harness)
    sys.path.insert(0, str(harness))  # it imports files beside it
    sys.argv = ["run.py", *options, str(place)]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python run.py PEFT_CHECKOUT EXPERIMENT [options of PEFT's run.py]")
    main(*sys.argv[1:])
