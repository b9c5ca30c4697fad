"""What the process that ranks are forked from does first, so that no rank has to: `harness.Ranks`."""

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  deepspeed.initialize imports it, and inductor with it

import srde_ds.training.trainer  # noqa: F401

# A full collection is slow over all of these modules' objects, and DeepSpeed asks for one in each engine.
gc.collect()
gc.freeze()
