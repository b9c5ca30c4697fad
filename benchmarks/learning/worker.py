"""One run from its settings to its line of results, in a process that does many of them."""

from __future__ import annotations

import gc
import shutil
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.learning import measure, methods
from benchmarks.learning.data import Inputs, describe_base, prepare
from benchmarks.learning.plan import Record, Run
from benchmarks.learning.variants import patched
from srde_ds.utils.environment import environment


class Worker:
    """Does runs in this process, one after the other.

    Args:
        base: folder of the base.
        folder: for data and scratch; a run's own folder in it is deleted once it is measured.
        threads: of torch on the CPU.
        revision: commit of the code; None: as the repository says.
    """

    def __init__(self, base: Path, folder: Path, threads: int, revision: str | None) -> None:
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # for the model; GramMuon's products stay exact
        self.base, self.folder, self.threads, self.revision = base, folder, threads, revision

    def __call__(self, run: Run) -> Record:
        """Train, measure, and say on what."""
        started = time.monotonic()
        inputs = prepare(run.budget, run.seed, base=self.base, folder=self.folder)
        folder = self.folder / f"run-{run.key('')}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with patched(run.flags.get("variant")):
                trained = methods.train(run, inputs, folder)
                figures = methods.figures(trained)
                if run.report:
                    figures |= self._report(run, inputs, trained)
                del trained
        except methods.Diverged as error:
            figures = {"diverged": str(error)}
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # engines hold cycles
        torch.cuda.empty_cache()
        here = environment()
        figures |= {"versions": here["versions"] | {"peft": version("peft")}, "python": here["python"]}
        figures |= {"git_revision": self.revision or here["git_revision"]}
        figures |= {"threads": self.threads, "base": describe_base(self.base), "data": inputs.content()}
        figures |= {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
        return figures | {"seconds": round(time.monotonic() - started, 1)}

    def _report(self, run: Run, inputs: Inputs, trained: methods.Trained) -> Record:
        """What the tables show: held-out items, text, routing."""
        model, tokenizer, budget = trained.model, inputs.tokenizer(), run.budget
        items = measure.item_figures(
            model,
            tokenizer,
            inputs.test_records(),
            batch_size=budget.eval_batch,
            max_new_tokens=budget.new_tokens,
            scored=budget.data == "real",
        )
        perplexity = measure.text_perplexity(
            model,
            tokenizer,
            inputs.text.read_text(encoding="utf-8"),
            tokens=budget.text_tokens,
            window=budget.max_length,
            batch_size=budget.rows_at_once,
        )
        figures: Record = {"test_loss": items.loss, "accuracy": items.accuracy, "text_perplexity": perplexity}
        if items.usage is not None and model.config.num_experts > 1:
            figures["routing"] = measure.routing_figures(items.usage, model.config.top_k)
        if run.expert_table:
            rows = inputs.split("test")
            figures["experts_alone"] = measure.expert_table(model, rows, budget.rows_at_once, budget.table_rows)
        return figures


_worker: Worker


def start(base: Path, folder: Path, threads: int, revision: str | None) -> None:
    """Initialises a process of a pool."""
    global _worker
    _worker = Worker(base, folder, threads, revision)


def work(run: Run) -> Record:
    """A task of a pool whose processes `start` initialised."""
    return _worker(run)
