"""What the process that ranks are forked from does first, so that no rank has to: `harness.Ranks`."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import srde_ds.training.trainer  # noqa: F401
from srde_ds.distributed import deepspeed_internals

deepspeed_internals.avoid_jit_builds()
deepspeed_internals.import_muon_uncompiled()
get_checkpoint_conversion_mapping("llama")  # compiles the patterns of all families

# A full collection is slow over all of these modules' objects, and DeepSpeed asks for one in each engine.
gc.collect()
gc.freeze()
