"""Tokens, labels and rows: loss on responses alone, one EOS, no document cut or lost by packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from srde_ds.config import DOMAINS
from srde_ds.data.packing import Document, best_fit, check_markers, fit, pack, prompt_ids, tokenize
from srde_ds.data.records import Record
from srde_ds.data.template import template_kind
from srde_ds.errors import SRDEError
from tests.data_helpers import CHATML, tiny_tokenizer

# A template whose turns end with a marker that is not EOS, as Gemma's.
GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}<turn_end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# A template that adds an empty thought to the last response only, as Qwen3's.
THINKING = CHATML.replace(
    "\n{{ m['content'] }}",
    "\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)


def record(*texts: str, system: str | None = None) -> Record:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Record("math", ([{"role": "system", "content": system}] if system else []) + messages, None, "", "x.jsonl:1")


def shown(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[str, list[str]]:
    """The whole text, and the text of each labelled run."""
    runs: list[list[int]] = []
    for i, labelled in enumerate(document.is_response):
        if labelled:
            if i == 0 or not document.is_response[i - 1]:
                runs.append([])
            runs[-1].append(int(document.input_ids[i]))
    return str(tokenizer.decode(document.input_ids)), [str(tokenizer.decode(run)) for run in runs]


def test_only_the_response_is_labelled_and_ends_with_one_eos() -> None:
    tokenizer = tiny_tokenizer()
    document = tokenize([record("what is 1?", "the answer is 2")], tokenizer)[0]
    text, runs = shown(tokenizer, document)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is 1?<|im_end|>\n"
        "<|im_start|>assistant\nthe answer is 2<|im_end|>"
    )
    assert runs == ["the answer is 2<|im_end|>"] and not document.by_parts
    assert document.input_ids[-1] == tokenizer.eos_token_id and document.input_ids[-2] != tokenizer.eos_token_id


def test_every_assistant_turn_is_labelled() -> None:
    tokenizer = tiny_tokenizer()
    document = tokenize([record("a", "b", "c", "d", system="S")], tokenizer)[0]
    text, runs = shown(tokenizer, document)
    assert runs == ["b<|im_end|>", "d<|im_end|>"]
    assert text.startswith("<|im_start|>system\nS<|im_end|>") and "Be brief" not in text


@pytest.mark.parametrize("template", [CHATML, GEMMA_LIKE, THINKING, None])
@pytest.mark.parametrize("response", ["4", "\n\nthe answer", "  4", "i"])
def test_training_sees_the_prompt_that_generation_starts_from(template: str | None, response: str) -> None:
    tokenizer = tiny_tokenizer(template)
    item = record("what is 1?", response)
    document = tokenize([item], tokenizer)[0]
    prompt = prompt_ids(tokenizer, item.prompt)
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert not document.is_response[: len(prompt)].any() and document.is_response[len(prompt) :].all()
    assert response.strip() in tokenizer.decode(document.input_ids[len(prompt) :])
    assert (document.input_ids[len(prompt) :] == tokenizer.eos_token_id).tolist()[:-1].count(True) == 0
    assert document.input_ids[-1] == tokenizer.eos_token_id


def test_a_merge_across_the_border_is_tokenised_by_parts() -> None:
    tokenizer = tiny_tokenizer()
    plain, merged = tokenize([record("a", "b"), record("a", "\nb")], tokenizer)
    assert (plain.by_parts, merged.by_parts) == (False, True)
    assert shown(tokenizer, merged)[1] == ["\nb<|im_end|>"]


def test_a_turn_marker_that_is_not_eos_is_learnt_and_eos_follows() -> None:
    tokenizer = tiny_tokenizer(GEMMA_LIKE)
    text, runs = shown(tokenizer, tokenize([record("a", "b", "c", " d ")], tokenizer)[0])
    assert runs == ["b<turn_end>", "d<turn_end><|im_end|>"]
    assert text.count("<s>") == 1


def test_a_thought_in_the_last_turn_leaves_the_earlier_turns_labelled() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    # "i" also occurs inside "<think>": the label must not start there.
    runs = shown(tokenizer, tokenize([record("a", "b", "c", "i")], tokenizer)[0])[1]
    assert runs == ["b<|im_end|>", "<think>\n\n</think>\n\ni<|im_end|>"]


@pytest.mark.parametrize("writes_bos", [False, True])
def test_without_a_chat_template_the_fallback_is_used(writes_bos: bool) -> None:
    tokenizer = tiny_tokenizer(None, writes_bos=writes_bos)
    assert template_kind(tokenizer) == "fallback" and template_kind(tiny_tokenizer()) == "tokenizer"
    text, runs = shown(tokenizer, tokenize([record("a", "b", "c", "d")], tokenizer)[0])
    assert text == ("<s>" if writes_bos else "") + "a\nb<|im_end|>\nc\nd<|im_end|>"
    assert runs == ["b<|im_end|>", "d<|im_end|>"]


def test_bos_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer("{{ bos_token }}" + CHATML, writes_bos=True)
    ids = tokenize([record("a", "b")], tokenizer)[0].input_ids
    assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1


def test_markers_and_refusals_are_errors_with_the_line() -> None:
    with pytest.raises(SRDEError, match=r"x.jsonl:1: a response holds the tokenizer's EOS token '<\|im_end\|>'"):
        check_markers(tiny_tokenizer(), record("a", "b <|im_end|> c"))
    check_markers(tiny_tokenizer(), record("a <|im_end|>", "b"))
    refusing = tiny_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(SRDEError, match="refuses these messages: no system role"):
        tokenize([record("a", "b")], refusing)
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(SRDEError, match="has no EOS token"):
        check_markers(without_eos, record("a", "b"))


def document(length: int, prompt: int = 1, start: int = 5) -> Document:
    return Document(np.arange(start, start + length, dtype=np.int32), np.arange(length) >= prompt, "x.jsonl:7", False)


def test_too_long_documents_follow_the_policy() -> None:
    long = document(10, prompt=4)
    assert fit(document(8), 8, "error") is not None
    with pytest.raises(SRDEError, match=r"x.jsonl:7: 10 tokens exceed max_length=8"):
        fit(long, 8, "error")
    assert fit(long, 8, "drop") is None
    cut = fit(long, 8, "truncate")
    assert cut is not None and cut.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12] and cut.is_response.sum() == 4
    assert fit(long, 4, "truncate") is None, "only prompt would remain"


def test_best_fit_on_a_case_done_by_hand() -> None:
    # 6 and 4 fill a row; beside 5 there is room for 3 and 2, but not for 3 and 3.
    assert best_fit([2, 3, 4, 5, 6, 3], 10) == [[4, 2], [3, 0, 1], [5]]
    # Filling rows with the longest that fits would take three: 6 + 3, 5 + 4, 2.
    assert best_fit([3, 6, 4, 5, 2], 10) == [[1, 2], [3, 4, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_places_each_once_within_capacity(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 65, size=generator.integers(1, 200)).tolist()
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    # Best fit keeps at most one row half empty: two of them would have been one.
    assert sum(2 * sum(lengths[i] for i in row) <= 64 for row in rows) <= 1


def short(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(40, 120, size=2000)


def long_tailed(generator: np.random.Generator) -> np.ndarray:
    return generator.lognormal(5.0, 1.2, size=5000).clip(8, 2048).astype(int)


def very_long_tailed(generator: np.random.Generator) -> np.ndarray:
    return (40 * (1 + generator.pareto(1.1, size=5000))).clip(8, 2048).astype(int)


def nearly_a_fifth(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(44, 58, size=2000)


@pytest.mark.parametrize(
    ("draw", "capacity"),
    [(short, 512), (nearly_a_fifth, 256), (long_tailed, 2048), (very_long_tailed, 2048), (long_tailed, 4096)],
)
def test_over_95_percent_of_the_positions_are_used(
    draw: Callable[[np.random.Generator], np.ndarray], capacity: int
) -> None:
    for seed in range(3):
        lengths = draw(np.random.default_rng(seed)).tolist()
        assert sum(lengths) / (capacity * len(best_fit(lengths, capacity))) > 0.95


def test_the_quick_starts_documents_fill_their_rows() -> None:
    # Tokens of its 9,000 training documents with its base's tokenizer: length -> how many.
    counts = json.loads((Path(__file__).parents[1] / "quickstart_lengths.json").read_text())
    total = rows = 0
    for domain in DOMAINS:
        lengths = [int(length) for length, count in counts[domain].items() for _ in range(count)]
        total += sum(lengths)
        rows += len(best_fit(lengths, 256))
    assert total / (256 * rows) > 0.95


def test_rows_keep_documents_whole_and_restart_positions() -> None:
    documents = [document(n, prompt=2, start=1000 * n) for n in (3, 5, 7, 9, 4)]
    rows = list(pack(documents, 12, 0, np.random.default_rng(3)))
    seen = []
    for row in rows:
        assert all(row[key].shape == (12,) and row[key].dtype == np.int32 for key in ("input_ids", "labels"))
        starts = [*np.flatnonzero(row["position_ids"] == 0), 12]
        for start, end in zip(starts, starts[1:], strict=False):
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            if start < row["length"]:
                seen.append(ids.tolist())
                assert labels.tolist() == [-100, -100, *ids[2:]]
            else:
                assert (ids == 0).all() and (labels == -100).all()
    assert sorted(seen) == sorted(d.input_ids.tolist() for d in documents)
    again = list(pack(documents, 12, 0, np.random.default_rng(3)))
    assert all((a[key] == b[key]).all() for a, b in zip(rows, again, strict=True) for key in ("input_ids", "labels"))


@pytest.mark.parametrize("template", [CHATML, GEMMA_LIKE, THINKING, None])
def test_cutting_at_special_tokens_changes_no_token(template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [
        "what is 1?",
        " the\n\nanswer ",
        "<|im_end|>",
        "a<|im_start|>b",
        "",
        "<s>x",
        "\n\n\n",
        "caf\u00e9 \u4e2d",
    ]
    records = [
        Record("math", [{"role": "user", "content": q}, {"role": "assistant", "content": a}], None, "", "here")
        for q in contents
        for a in contents
        if q.strip() and a.strip()
    ]
    tokenizer = tiny_tokenizer(template)
    cut = tokenize(records, tokenizer)
    monkeypatch.setattr("srde_ds.data.packing._segments", lambda _, text: [text])
    for ours, whole in zip(cut, tokenize(records, tokenizer), strict=True):
        assert ours.input_ids.tolist() == whole.input_ids.tolist() and ours.by_parts == whole.by_parts
        assert ours.is_response.tolist() == whole.is_response.tolist()


def test_a_refused_conversation_among_many_is_named() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    good = Record("math", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, "", "one")
    bad = Record("math", [{"role": "system", "content": "s"}, *good.messages], None, "", "two")
    with pytest.raises(SRDEError, match="^two: the tokenizer's chat template refuses these messages: no system role"):
        tokenize([good, bad, good], tiny_tokenizer(refusing))


def test_state_left_by_calls_changes_no_token() -> None:
    tokenizer = tiny_tokenizer()
    record = Record("math", [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "b"}], None, "")
    (before,) = tokenize([record], tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "what is"], padding=True, truncation=True, max_length=4)
    assert tokenize([record], tokenizer)[0].input_ids.tolist() == before.input_ids.tolist()
