"""The options of `srde-ds evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from srde_ds.config.values import option
from srde_ds.data.conversation import TrainOn
from srde_ds.evaluation.sandbox import Sandbox
from srde_ds.inference.options import ModelOptions


@dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    """On which items experts are evaluated, and how."""

    eval_file: str = option(
        "", "held-out items with answers: records in a file, a folder or a pattern", metavar="FILE", required=True
    )
    compare_baseline: bool = option(False, "also run the bare base on the same items")
    each_expert: bool = option(False, "also measure the loss of every domain with each expert alone")
    run_code: bool = option(False, "score items with tests by running the programs that the model writes, in a sandbox")
    sandbox: Sandbox = option("bubblewrap", "what confines these programs; none: they can do everything that you can")
    train_on: TrainOn | None = option(
        None,
        "which of the assistant's turns count in the loss (default: those that the run was trained on, else all)",
        metavar="all|last",
    )
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
    seed: int = option(42, "seed of the bootstrap", metavar="N", minimum=0)
    output_file: str | None = option(
        None,
        "JSON to write (default: evaluation.json in the run folder or beside the weights)",
        metavar="FILE",
        aliases=("output",),
    )
