"""What must be set before any test module imports datasets or transformers."""

import os

# The verbs set these before they import anything; here other tests may have imported the libraries before.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
