"""What must be set before any test module imports datasets, transformers or triton."""

import os
from pathlib import Path

# The verbs set these before they import anything; here other tests may have imported the libraries before.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Triton's own functions are made for its interpreter, or for a GPU, when something first imports it: torch.compile may.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Else each process that compiles starts others that would compile Triton's kernels: eight seconds of a core.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
