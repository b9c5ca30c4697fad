"""Losses, answers, intervals and the shape of an evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from srde_ds.data.packing import prompt_ids, tokenize
from srde_ds.errors import SRDEError
from srde_ds.evaluation import results as results_module
from srde_ds.evaluation.bootstrap import interval, resampled_sums
from srde_ds.evaluation.compare import EvaluationSettings, evaluate, evenly_by_domain
from srde_ds.evaluation.perplexity import response_losses
from srde_ds.evaluation.results import generated_answers
from srde_ds.evaluation.table import format_tables
from srde_ds.inference import batches, many
from srde_ds.inference.generate import decode
from srde_ds.model.policy import RoutingPolicy
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import records, tiny_model


def settings(**given: Any) -> EvaluationSettings:
    values: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 4, "max_samples": 100, "seed": 0}
    return EvaluationSettings(**values | {"compare_baseline": False} | given)


def test_losses_equal_a_direct_computation_for_each_item() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    found = response_losses(model, tokenizer, items, max_length=256, batch_size=4, count_experts=True)
    for document, item in zip(tokenize(items, tokenizer), found, strict=True):
        ids = torch.from_numpy(document.input_ids).long()
        choices: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            logits = model(ids[None], policy=RoutingPolicy(choices=choices)).logits[0]
        chosen = torch.from_numpy(document.is_response)[1:]
        direct = -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[chosen]
        assert item.tokens == int(chosen.sum())
        assert item.loss_sum == pytest.approx(direct.sum().item(), rel=1e-5)
        taken = [torch.bincount(choices_TK.flatten(), minlength=3) for choices_TK in choices.values()]
        assert item.assignments is not None and item.assignments.equal(torch.stack(taken))


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_batching_changes_neither_losses_nor_answers(batch_size: int) -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    whole = response_losses(model, tokenizer, items, max_length=256, batch_size=2)
    cut = response_losses(model, tokenizer, items, max_length=256, batch_size=batch_size)
    assert [item.loss_sum for item in cut] == pytest.approx([item.loss_sum for item in whole], rel=1e-5)
    assert [item.tokens for item in cut] == [item.tokens for item in whole]
    answers = generated_answers(model, tokenizer, items, max_new_tokens=8, batch_size=2)
    assert generated_answers(model, tokenizer, items, max_new_tokens=8, batch_size=batch_size) == answers
    assert len({answer.text for answer in answers}) > 1


def test_answers_equal_greedy_decoding_without_cache_and_without_batch() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    answers = generated_answers(model, tokenizer, items, max_new_tokens=8, batch_size=5)
    for record, answer in zip(items, answers, strict=True):
        ids = prompt_ids(tokenizer, record.prompt)
        length = len(ids)
        while len(ids) < length + 8 and tokenizer.eos_token_id not in ids[length:]:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == decode(tokenizer, ids[length:]) and answer.cut == (
            tokenizer.eos_token_id not in ids[length:]
        )


def test_a_batch_ends_at_eos_without_what_follows() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    free = [answer.text for answer in generated_answers(model, tokenizer, items, max_new_tokens=12, batch_size=9)]
    stop = next(letter for letter in free[0][1:] if letter.isascii() and letter != free[0][0])
    model.base.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(stop)[:1])
    written = generated_answers(model, tokenizer, items, max_new_tokens=12, batch_size=9)
    stopped = [answer.text for answer in written]
    ended = [text.partition(stop)[0] for text in free]
    assert stopped == ended and ended != free
    assert [answer.cut for answer in written] == [stop not in text for text in free]


def test_long_items_get_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_TOKENS", 100)
    lengths = [5, 150, 40, 50, 30, 20, 10]
    cut = list(batches.batches_by_length(lengths, 4, ""))
    assert cut == [[1], [3, 2], [4, 5, 6], [0]]


def test_bootstrap_interval_holds_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for trial in range(40):
        sample = random.normal(3.0, 1.0, size=(80, 1))
        low, high = interval(resampled_sums(sample, seed=trial)[:, 0] / 80)
        held += low <= 3.0 <= high
        assert low < sample.mean() < high
    assert 34 <= held <= 40


def test_bootstrap_is_seeded_and_paired() -> None:
    table = np.random.default_rng(1).normal(size=(30, 1)) @ np.ones((1, 2))
    sums = resampled_sums(table, seed=5)
    assert (sums[:, 0] == sums[:, 1]).all() and sums[:, 0].std() > 0
    assert (sums == resampled_sums(table, seed=5)).all()
    assert not (sums == resampled_sums(table, seed=6)).all()


def test_samples_are_taken_evenly_in_file_order() -> None:
    items = records()
    domains = [record.domain for record in items]
    lopsided = [*items[::2], items[1]]
    assert domains[:2] == ["logic", "math"]
    assert [record.where for record in evenly_by_domain(items, 4)] == ["made:0", "made:1", "made:2", "made:3"]
    assert [record.where for record in evenly_by_domain(lopsided, 3)] == ["made:0", "made:2", "made:1"]
    assert evenly_by_domain(items, 100) == items


def test_shape_of_an_evaluation_and_its_sums() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    result, lines = evaluate(model, tokenizer, items, settings(compare_baseline=True))
    json.dumps([result, lines], allow_nan=False)
    assert list(result["domains"]) == ["math", "logic"]  # the experts' order, not the file's
    for figures in [result["overall"], *result["domains"].values()]:
        assert set(figures) == {"srde", "base", "difference"}
        for name in ("srde", "base"):
            one = figures[name]
            assert one["perplexity"] == pytest.approx(np.exp(one["loss"]))
            assert one["loss_interval"][0] <= one["loss"] <= one["loss_interval"][1]
        assert figures["difference"]["loss"] == pytest.approx(figures["srde"]["loss"] - figures["base"]["loss"])
        low, high = figures["difference"]["loss_interval"]
        assert low <= figures["difference"]["loss"] <= high
    assert result["overall"]["srde"]["items"] == 9 and result["overall"]["srde"]["scored"] == 8
    assert result["domains"]["logic"]["srde"]["items"] == 5 and result["domains"]["logic"]["srde"]["scored"] == 4
    for name in ("srde", "base"):
        tokens = [line[name]["tokens"] for line in lines]
        mean = np.average([line[name]["loss"] for line in lines], weights=tokens)
        assert result["overall"][name]["loss"] == pytest.approx(mean)
        scored = [line[name]["correct"] for line in lines if line["answer"] is not None]
        assert result["overall"][name]["accuracy"] == pytest.approx(np.mean(scored))
    share = torch.tensor(result["usage"]["share_by_layer"])
    assert share.shape == (2, 2, 3)
    assert torch.allclose(share.sum(2), torch.ones(2, 2))
    assert torch.allclose(share.mean(0), torch.tensor(result["usage"]["share"]))
    assert [line["answer"] for line in lines] == [record.answer for record in items]


def test_the_base_is_run_without_experts() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    result, _ = evaluate(model, tokenizer, items, settings(compare_baseline=True))
    with model.no_experts():
        bare = response_losses(model, tokenizer, items, max_length=256, batch_size=4)
    loss = sum(item.loss_sum for item in bare) / sum(item.tokens for item in bare)
    assert result["overall"]["base"]["loss"] == pytest.approx(loss)
    assert result["overall"]["srde"]["loss"] != pytest.approx(loss, rel=1e-3)


def test_a_right_answer_counts_and_a_domain_without_answers_has_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    said = generated_answers(model, tokenizer, items, max_new_tokens=4, batch_size=4)
    items = [
        replace(record, answer=answer.text if record.domain == "math" else None)
        for record, answer in zip(items, said, strict=True)
    ]
    cut, lines = evaluate(model, tokenizer, items, settings())
    assert all(answer.cut for answer in said) and cut["domains"]["math"]["srde"]["accuracy"] == 0.0
    assert all(line["srde"].get("cut", False) == (line["domain"] == "math") for line in lines)
    monkeypatch.setattr(many, "is_cut", lambda *_: False)
    result, _ = evaluate(model, tokenizer, items, settings())
    assert result["domains"]["math"]["srde"]["accuracy"] == 1.0
    assert result["domains"]["logic"]["srde"]["accuracy"] is None
    assert "base" not in result["overall"] and "difference" not in result["overall"]
    table = format_tables(result)
    assert "100 %" in table and "logic" in table and "→" not in table


def test_table_shows_base_and_srde_with_intervals() -> None:
    result, _ = evaluate(tiny_model(), tiny_tokenizer(), records(), settings(compare_baseline=True))
    lines = format_tables(result).splitlines()
    math = result["domains"]["math"]
    row = next(line for line in lines if line.startswith("math"))
    assert f"{math['base']['loss']:.3f} → {math['srde']['loss']:.3f}" in row
    assert f"[{math['difference']['loss_interval'][0]:+.3f}, " in row
    assert lines[-1].startswith("overall")


def test_an_item_that_is_too_long_is_named() -> None:
    model, tokenizer = tiny_model(context=64), tiny_tokenizer()
    with pytest.raises(SRDEError, match=r"made:\d: \d+ tokens exceed 64"):
        response_losses(model, tokenizer, records(), max_length=64, batch_size=4)
    with pytest.raises(SRDEError, match=r"made:\d: \d+ tokens and up to 60 new ones exceed"):
        generated_answers(model, tokenizer, records(), max_new_tokens=60, batch_size=4)


def test_prompts_are_checked_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "response_losses", None)
    with pytest.raises(SRDEError, match=r"made:\d: \d+ tokens and up to 250 new ones exceed"):
        evaluate(tiny_model(), tiny_tokenizer(), records(), settings(max_new_tokens=250))


def test_bad_values_are_refused() -> None:
    with pytest.raises(SRDEError, match="batch_size=0"):
        evaluate(
            tiny_model(),
            tiny_tokenizer(),
            records(),
            settings(batch_size=0),
        )
