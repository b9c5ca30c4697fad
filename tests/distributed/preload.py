"""What the process that ranks are forked from does first, so that no rank has to: `harness.Ranks`."""

import gc
from functools import cache

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import srde_ds.training.trainer  # noqa: F401
from srde_ds.distributed import deepspeed_internals

deepspeed_internals.avoid_jit_builds()
deepspeed_internals.import_muon_uncompiled()
get_checkpoint_conversion_mapping("llama")  # compiles the patterns of all families
numa = deepspeed_internals.deepspeed.utils.numa
numa.get_numa_cores = cache(numa.get_numa_cores)  # on CPUs deepspeed runs `numactl` after each backward

# A full collection is slow over all of these modules' objects, and DeepSpeed asks for one in each engine.
gc.collect()
gc.freeze()
