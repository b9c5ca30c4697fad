"""SRDE as a method of PEFT: `get_peft_model(base, SRDEConfig(...))`, `PeftModel.from_pretrained(base, folder)`.

    config.py        options of the method
    registration.py  adds the method to PEFT
    blocks.py        reads the weights of quantised blocks
    layer.py         a feed-forward block with each adapter's experts
    tuner.py         attaches, merges and removes experts
    steps.py         routing in training
    state.py         an adapter's tensors in models and files
    loading.py       checks before values are loaded
    callback.py      callback for the trainers of transformers and TRL
    warm_start.py    sets the routers from data
    rows.py          turns files of records into rows for TRL
    statistics.py    measures the domains for `srde-ds combine`

Importing this package adds the method to PEFT. The experts are those of `srde_ds.model`, so both forms compute the
same.
"""

from __future__ import annotations

from importlib.util import find_spec

from srde_ds.errors import SRDEError

if find_spec("peft") is None:
    raise SRDEError("package 'peft' is missing. Install it: pip install 'srde-ds[peft]'")

from srde_ds.peft.config import SRDEConfig
from srde_ds.peft.registration import register
from srde_ds.peft.tuner import SRDETuner

__all__ = ["SRDEConfig", "SRDETuner"]

register(SRDEConfig, SRDETuner)
