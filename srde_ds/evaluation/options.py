"""The options of `srde-ds evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde_ds.config.values import option, weights_option
from srde_ds.evaluation.sandbox import Sandbox


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and on which items."""

    weights: str = weights_option()
    eval_file: str = option("", "held-out items with answers, as JSONL", metavar="FILE", required=True)
    base: str | None = option(None, "folder or Hub id of the base (default: where it was in training)", metavar="BASE")
    allow_download: bool = option(
        False, "download the base that the weights name from the Hub, if it is not on this machine"
    )
    compare_baseline: bool = option(False, "also run the bare base on the same items")
    route_by: Literal["token", "prompt"] = option(
        "token",
        "what decides on the experts: each token for itself, or the whole prompt, which is then read twice: all tokens "
        "use the expert that most of its tokens choose",
    )
    each_expert: bool = option(False, "also measure the loss of every domain with each expert alone")
    run_code: bool = option(False, "score items with tests by running the programs that the model writes, in a sandbox")
    sandbox: Sandbox = option("bubblewrap", "what confines these programs; none: they can do everything that you can")
    max_samples: int = option(1000, "most items, taken evenly from the domains", metavar="ITEMS", minimum=1)
    max_new_tokens: int | None = option(
        None,
        "longest generated answer, in tokens",
        metavar="TOKENS",
        aliases=("max_tokens",),
        minimum=1,
        derived="64, at most half of the base's context",
    )
    batch_size: int = option(32, "items in a batch", metavar="ITEMS", minimum=1)
    bf16: bool = option(True, "compute in bfloat16; false: in fp32")
    seed: int = option(42, "seed of the bootstrap", metavar="N", minimum=0)
    output_file: str | None = option(
        None,
        "JSON to write (default: evaluation.json in the run folder or beside the weights)",
        metavar="FILE",
        aliases=("output",),
    )
