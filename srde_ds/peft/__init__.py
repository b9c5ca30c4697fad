"""SRDE as a method of PEFT: `get_peft_model(base, SRDEConfig(...))`, `PeftModel.from_pretrained(base, folder)`.

    config.py        the options of the method        registration.py  makes the method known to PEFT
    layer.py         a block with each adapter's experts     tuner.py  puts the experts in, merges, takes them out
    steps.py         routing in training                     state.py  an adapter's tensors in models and files
    callback.py      what trainers of transformers and TRL call   warm_start.py  routers that know the domains
    rows.py          files of records as rows for TRL     statistics.py  domains, for `srde-ds combine`
    loading.py       what has to be right before values are loaded

Importing this package makes the method known. The experts are those of `srde_ds.model`, so both forms compute the same.
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
