"""What the runs read: items of six domains, and a text of no domain.

The items are the quick start's generated tasks, new for each seed; or real ones, the files of `REAL_FOLDER`, whose
validation items are drawn from the training split by the seed and whose test items are the same for every seed.

python -m benchmarks.learning.data --budget full     # only the items, to be carried where there is no reasoning-gym
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from benchmarks.learning.plan import Budget, Plan
from srde_ds.config import DOMAINS
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset, files_hash
from srde_ds.data.inputs import read_records
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.data.records import Record
from srde_ds.data.synthetic.tasks import generate
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.utils.files import write_text

ROOT = Path(__file__).resolve().parents[2]
# One <domain>.jsonl.gz a domain with prompt, response, answer, domain and split.
REAL_FOLDER = Path(os.environ.get("SRDE_REAL_DATA", ROOT.parent / "shared/real"))
# Jules and Michel Verne, "In the Year 2889" (1889): public domain, Project Gutenberg 19362, shipped by reasoning-gym.
# Single words of it occur in prompts of the domain `code`; prompts carry no loss.
TEXT = "in_the_year_2889.txt"
TEXT_BORDERS = "*** START OF THE PROJECT GUTENBERG", "*** END OF THE PROJECT GUTENBERG"


@dataclass(frozen=True)
class Inputs:
    """The files of one seed.

    Attributes:
        rows: folder of packed rows, splits train, validation and test.
        items: JSONL of the items of all splits.
        text: the text, one paragraph a line.
    """

    base: Path
    rows: Path
    items: Path
    text: Path

    def split(self, name: str) -> datasets.Dataset:
        rows: datasets.Dataset = load_rows(self.rows, name, load_manifest(self.rows))
        return rows

    def test_records(self) -> list[Record]:
        return [record for record in read_records(self.items, DOMAINS) if record.split == "test"]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.base)

    def content(self) -> str:
        """Hash of the items."""
        return files_hash([self.items])


def prepare(budget: Budget, seed: int, *, base: Path, folder: Path) -> Inputs:
    """Make what is not there yet. A folder whose `items` were made elsewhere needs no reasoning-gym.

    Raises:
        SRDEError: items would be trained on more than once.
    """
    name = item_set(budget, seed)
    inputs = Inputs(
        base=base,
        rows=folder / "rows" / f"{name}-{budget.max_length}",
        items=folder / "items" / f"{name}.jsonl",
        text=folder / "items/text.txt",
    )
    (make_items if budget.data == "generated" else make_real_items)(budget, seed, inputs.items)
    make_text(inputs.text)
    manifest = build_dataset(
        RowsOfFiles(inputs.items, None, list(DOMAINS), max_length=budget.max_length, too_long="drop", seed=seed),
        inputs.rows,
        inputs.tokenizer(),
    )
    rows, needed = manifest.splits["train"].rows, budget.steps * budget.rows_per_step
    if rows < needed and budget.data == "generated":  # real items are few: small domains come up more than once
        raise SRDEError(
            f"train_items={budget.train_items}: {rows} rows, {needed} are needed to see each once. Raise it."
        )
    return inputs


def item_set(budget: Budget, seed: int) -> str:
    prefix = "" if budget.data == "generated" else f"{budget.data}-"
    return f"{prefix}{budget.train_items}-{budget.validation_items}-{budget.test_items}-seed{seed}"


def make_items(budget: Budget, seed: int, path: Path) -> None:
    """All splits in one file, if it is not there. All prompts differ, so no held-out one occurs in training."""
    if path.exists():
        return
    parts = ["test"] * budget.test_items + ["validation"] * budget.validation_items + ["train"] * budget.train_items
    made = []
    for domain in DOMAINS:
        items = generate(domain, len(parts), seed)
        made += [item | {"split": split} for item, split in zip(items, parts, strict=True)]
    random.Random(f"{seed}/items").shuffle(made)
    _write(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made))


def make_real_items(budget: Budget, seed: int, path: Path) -> None:
    """All splits in one file, if it is not there: at most `train_items`, `validation_items` and `test_items` a domain.

    Raises:
        SRDEError: a file of `REAL_FOLDER` is missing.
    """
    if path.exists():
        return
    made = []
    for domain in DOMAINS:
        source = REAL_FOLDER / f"{domain}.jsonl.gz"
        if not source.exists():
            raise SRDEError(f"SRDE_REAL_DATA={REAL_FOLDER}: has no {source.name}. Name the folder of the real items.")
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            items = [json.loads(line) for line in lines]
        # A seed of its own, so that every run is judged on the same test items.
        test = [item for item in items if item["split"] == "test"]
        random.Random(f"{domain}/test").shuffle(test)
        rest = [item for item in items if item["split"] == "train"]
        random.Random(f"{seed}/{domain}").shuffle(rest)
        validation, train = rest[: budget.validation_items], rest[budget.validation_items :]
        parts = {
            "test": test[: budget.test_items],
            "validation": validation,
            "train": train[: budget.train_items],
        }
        made += [item | {"split": split} for split, own in parts.items() for item in own]
    random.Random(f"{seed}/items").shuffle(made)
    _write(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made))


def make_text(path: Path) -> None:
    """The text without its licence, if it is not there."""
    if path.exists():
        return
    from reasoning_gym.data import read_data_file  # two seconds

    body = read_data_file(TEXT).partition(TEXT_BORDERS[0])[2].partition("\n")[2].partition(TEXT_BORDERS[1])[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in body.split("\n\n")]
    _write(path, "".join(paragraph + "\n" for paragraph in paragraphs if paragraph))


def describe_base(base: Path) -> str:
    """What results of different bases are told apart by."""
    config = json.loads((base / "config.json").read_text())
    sizes = (config[name] for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"))
    return "{}, {} layers, hidden {}, vocabulary {}".format(*sizes)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text, many_writers=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    options = parser.parse_args()
    budget = Plan(options.budget, lambda run: None).budget
    make_text(options.folder / "items/text.txt")
    for seed in (*budget.sweep_seeds, *budget.seeds):
        make = make_items if budget.data == "generated" else make_real_items
        make(budget, seed, options.folder / "items" / f"{item_set(budget, seed)}.jsonl")
    print(f"Written: {options.folder / 'items'}")


if __name__ == "__main__":
    main()
