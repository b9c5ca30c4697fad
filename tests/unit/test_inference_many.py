"""Many prompts, votes among samples, refinement, files of prompts; cached equals uncached in a padded batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import pad_token_id, prompt_ids
from srde_ds.errors import SRDEError
from srde_ds.inference import many
from srde_ds.inference.generate import Sampling, decode, generate
from srde_ds.inference.many import (
    REFINE_PROMPT,
    TokenExperts,
    Written,
    answer_many,
    generate_many,
    left_padded,
    majority,
    token_texts,
)
from srde_ds.inference.output import check_output, write_lines
from srde_ds.inference.prompts import Prompt, read_prompts
from srde_ds.model.adapter import SRDEModel, add_experts
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import NAMES, tiny_model
from tests.helpers import adapter_config, randomize, tiny_llama

GREEDY = Sampling(6, temperature=0.0, top_p=1.0)


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(f"file:{number}", messages, None) for number, messages in enumerate(asked(*texts), start=1)]


def texts_of(written: list[Written]) -> list[str]:
    return [answer.text for answer in written]


def alone(model: SRDEModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], count: int) -> list[int]:
    """Greedy tokens after `ids`, each by a forward with gradients over all before it: no cache, batch or padding."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("scope", ["shared", "per_expert"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_a_padded_batch_with_a_cache_equals_single_prompts_without(granularity: str, scope: str) -> None:
    tokenizer = tiny_tokenizer()
    config = adapter_config(granularity=granularity, support_scope=scope)
    model = randomize(add_experts(tiny_llama(vocab_size=len(tokenizer)), config, expert_names=NAMES, seed=0))
    prompts = [prompt_ids(tokenizer, messages) for messages in asked("a", "what is é + ü?", "the answer is " * 3)]
    ids, mask = left_padded(prompts, pad_token_id(tokenizer))
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    options |= {"pad_token_id": pad_token_id(tokenizer), "eos_token_id": None}
    with torch.inference_mode():
        cached = model.generate(input_ids=ids, attention_mask=mask, **options)
        with model.no_experts():
            bare = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, prompt in zip(cached.tolist(), prompts, strict=True):
        assert row[ids.shape[1] - len(prompt) :] == alone(model, tokenizer, prompt, 12)
    assert not torch.equal(bare, cached)


def test_answers_come_in_the_order_of_the_prompts() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["a" * length for length in (3, 40, 1, 17, 9)]
    together = texts_of(generate_many(model, tokenizer, prompts_of(*texts), GREEDY, batch_size=2))
    single = [texts_of(generate_many(model, tokenizer, prompts_of(text), GREEDY, batch_size=1)) for text in texts]
    assert [[text] for text in together] == single and len(set(together)) > 1
    with pytest.raises(SRDEError, match="file:2: .* exceed the base's context"):
        generate_many(model, tokenizer, prompts_of("a", "b" * 300), GREEDY, batch_size=2)


def test_the_experts_of_a_padded_batch_are_those_of_each_prompt_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = prompts_of(*("a" * length for length in (3, 40, 1, 17, 9)))
    written = generate_many(model, tokenizer, prompts, GREEDY, batch_size=3, with_routing=True)
    plain = generate_many(model, tokenizer, prompts, GREEDY, batch_size=3)
    texts, routing = texts_of(written), [answer.routing or TokenExperts([], []) for answer in written]
    assert texts == texts_of(plain) and not any(answer.routing for answer in plain)
    for number, prompt in enumerate(prompts):
        single = generate(model, tokenizer, prompt.messages, GREEDY, show_routing=True)
        assert single.routing is not None
        own = single.routing.shares_TE[single.prompt_length :]
        assert "".join(routing[number].tokens) == texts[number] == single.text
        torch.testing.assert_close(torch.tensor(routing[number].shares), own[: len(routing[number].tokens)])
    assert len({str(of.shares) for of in routing}) > 1


def test_pieces_are_the_text_that_each_token_adds() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("it is é → 7", add_special_tokens=False)
    found = token_texts(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == decode(tokenizer, ids) and "\ufffd" not in "".join(found)
    cut = next(count for count in range(1, len(ids)) if decode(tokenizer, ids[:count]).endswith("\ufffd"))
    assert "".join(token_texts(tokenizer, ids[:cut])) == decode(tokenizer, ids[:cut])
    assert token_texts(tokenizer, []) == []


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["#### 4", "so the answer is 5", r"\boxed{5.0}"], (1, 2)),
        (["a", "b", "b", "a"], (0, 2)),  # of equals the first seen
        (["1/2", "2", "<answer>0.5</answer>"], (0, 2)),
        (["only"], (0, 1)),
        (["<think>a</think>B", "<think>b</think>\nB. iron", "A"], (0, 2)),
        (["<think>a", "<think>b", "B"], (2, 1)),  # thoughts that never end have no vote
        (["<think>a", "<think>b"], (0, 2)),
    ],
)
def test_the_majority_of_extracted_answers(texts: list[str], expected: tuple[int, int]) -> None:
    assert majority(texts) == expected


def test_samples_are_one_batch_and_refinement_asks_about_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[list[str]], int]] = []
    replies = iter([["it is 1", "answer: 2", "the answer is 2", "7", "8", "8.0"], ["better 2", "better 8"], ["x", "y"]])

    def fake(_: Any, __: Any, prompts: list[Prompt], *___: Any, batch_size: int) -> list[Written]:
        calls.append(([[m["content"] for m in prompt.messages] for prompt in prompts], batch_size))
        return [Written(text) for text in next(replies)]

    monkeypatch.setattr(many, "generate_many", fake)
    model: Any = None
    made = answer_many(model, model, prompts_of("p", "q"), GREEDY, batch_size=4, best_of_n=3, self_refine=2)
    assert calls[0] == ([["p"]] * 3 + [["q"]] * 3, 12)
    assert calls[1] == ([["p", "answer: 2", REFINE_PROMPT], ["q", "8", REFINE_PROMPT]], 4)
    assert calls[2][0] == [["p", "better 2", REFINE_PROMPT], ["q", "better 8", REFINE_PROMPT]]
    assert [(a.text, a.votes, a.drafts) for a in made] == [
        ("x", 2, ["answer: 2", "better 2"]),
        ("y", 2, ["8", "better 8"]),
    ]


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\n two \n", encoding="utf-8")
    assert read_prompts(lines) == [(f"{lines}:1", *asked("one"), None), (f"{lines}:3", *asked("two"), None)]
    objects = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    objects.write_text(
        json.dumps({"prompt": "a\u2028a", "domain": "x"}, ensure_ascii=False)
        + "\n"
        + json.dumps({"messages": messages})
    )
    assert [prompt.messages for prompt in read_prompts(objects)] == asked("a\u2028a", "b")


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    check_output(output)
    write_lines(output, ["é", "b"])
    assert output.read_text(encoding="utf-8") == "é\nb\n"
    for path, message in ((output.parent, "it is a folder"), (output / "a" / "b", "out.jsonl' is not a folder")):
        with pytest.raises(SRDEError, match=message):
            check_output(path)
    with pytest.raises(SRDEError, match="cannot be written: Is a directory"):
        write_lines(output.parent, ["a"])
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", r"p\.jsonl:1: not valid JSON"),
        ('{"prompt": "a"}\n{"prompt": 1}', r"p\.jsonl:2: field 'prompt' must be text, not a number"),
        ('{"answer": "a"}', "needs 'prompt' and 'response', or 'messages'"),
        ('{"prompt": "x \\ud83d y"}', r"p\.jsonl:1: field 'prompt' holds half a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "ask nothing"),
        ('{"messages": [1]}', "'messages' must be a list of objects"),
    ],
)
def test_files_that_are_not_understood(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(SRDEError, match=message):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(SRDEError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
