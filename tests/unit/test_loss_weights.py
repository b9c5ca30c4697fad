"""What counts alike in the loss: tokens, documents or domains, held against sums written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.loader import RowStream, collate
from srde_ds.data.loss_weights import LossWeights, Weighting
from srde_ds.data.manifest import DomainCounts, Manifest, Split, load_rows
from srde_ds.training.step import count_tokens
from tests.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.helpers import randomize, tiny_llama, tiny_srde

DOMAINS = ["long", "short"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Rows of several documents whose answers are long in one domain and short in the other."""
    folder = tmp_path_factory.mktemp("rows")
    long = [record | {"response": f"{record['response']} " * (2 + number % 5)} for number, record in
            enumerate(sums("long", range(12)))]  # fmt: skip
    jsonl = write_jsonl(folder / "train.jsonl", [*long, *sums("short", range(20, 30))])
    files = RowsOfFiles(jsonl, None, DOMAINS, max_length=256, too_long="error", seed=0)
    manifest = build_dataset(files, folder / "rows", tiny_tokenizer())
    return folder / "rows", manifest


def split_of(*counts: tuple[int, int]) -> Split:
    """Rows and response tokens of domains a, b, ..."""
    domains = {chr(97 + i): DomainCounts(rows=rows, response_tokens=tokens) for i, (rows, tokens) in enumerate(counts)}
    return Split("", "", 0, 0.0, "", domains)


def test_domains_count_alike_or_by_their_shares() -> None:
    even = LossWeights.of("domain", split_of((10, 900), (10, 90), (5, 10)), mixed=False)
    totals = [weight * tokens for weight, tokens in zip(even.of_domain, (900, 90, 10), strict=True)]
    assert totals == pytest.approx([1000 / 3] * 3)
    # Rows drawn by shares: a row of each domain counts alike, so that the shares of the rows are those of the loss.
    mixed = LossWeights.of("domain", split_of((10, 900), (10, 90), (5, 10)), mixed=True)
    a_row = [weight * tokens / rows for weight, (rows, tokens) in
             zip(mixed.of_domain, ((10, 900), (10, 90), (5, 10)), strict=True)]  # fmt: skip
    assert a_row == pytest.approx([40.0] * 3)
    assert LossWeights.of("domain", split_of((0, 0), (3, 9)), mixed=False).of_domain == (0.0, 1.0)
    assert LossWeights.of("document", split_of((1, 1)), mixed=False) == LossWeights("document")


def expected_loss(weighting: Weighting, by_document: list[tuple[int, list[float]]], manifest: Manifest) -> float:
    """The mean as its name says it, from domain and losses of the labels of each document."""
    if weighting == "token":
        losses = [loss for _, of_document in by_document for loss in of_document]
        return sum(losses) / len(losses)
    if weighting == "document":
        return sum(sum(losses) / len(losses) for _, losses in by_document) / len(by_document)
    tokens = [counts.response_tokens for counts in manifest.splits["train"].domains.values()]
    total = sum(sum(losses) / tokens[domain] for domain, losses in by_document)
    return total / sum(len(losses) / tokens[domain] for domain, losses in by_document)


@pytest.mark.parametrize("weighting", ["token", "document", "domain"])
def test_the_loss_is_the_mean_that_its_name_says(dataset: tuple[Path, Manifest], weighting: Weighting) -> None:
    folder, manifest = dataset
    rows = load_rows(folder, "train", manifest)
    weights = LossWeights.of(weighting, manifest.splits["train"], mixed=False)
    stream = RowStream(rows, seed=0, global_batch_rows=6, loss_weights=weights)
    model = randomize(tiny_srde(base=tiny_llama(vocab_size=len(tiny_tokenizer()))))
    by_document: list[tuple[int, list[float]]] = []
    with torch.no_grad():
        for row in stream.rows_of_step(0):
            batch = collate(stream.rows, [row])
            logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0].double()
            for place, (label, position) in enumerate(
                zip(batch["labels"][0].tolist(), batch["position_ids"][0].tolist(), strict=True)
            ):
                if position == 0:
                    by_document.append((int(batch["domain"]), []))
                if label >= 0:
                    by_document[-1][1].append(-float(log_softmax(logits[place - 1], 0)[label]))
        by_document = [document for document in by_document if document[1]]
        assert len({domain for domain, _ in by_document}) == 2 and len(by_document) > 6
        # In any cut into ranks and micro-batches the sums are the same.
        for world_size, batch_size in ((1, 6), (2, 1), (3, 2)):
            batches = [
                stream.micro_batch(0, micro, rank=rank, world_size=world_size, batch_size=batch_size)
                for micro in range(6 // world_size // batch_size)
                for rank in range(world_size)
            ]
            assert all(("label_weights" in batch) == (weighting != "token") for batch in batches)
            keys = ("input_ids", "position_ids", "labels", "label_weights", "token_mask")
            total = sum(float(model(**{k: b[k] for k in keys if k in b}).loss_sum) for b in batches)
            found = total / float(count_tokens(batches, 2)["label_weight"])
            assert found == pytest.approx(expected_loss(weighting, by_document, manifest), rel=1e-5)


def test_prompts_and_padding_have_no_weight(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    batch = collate(load_rows(folder, "train", manifest).with_format("numpy"), [0, 1])
    weights = LossWeights("document").of_batch(batch)
    assert weights is not None and ((weights > 0) == (batch["labels"] >= 0)).all()
    documents = ((batch["position_ids"] == 0) & batch["token_mask"]).sum()
    assert float(weights.sum()) == pytest.approx(int(documents))
