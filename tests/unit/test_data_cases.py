"""Small inputs modelled on what users report: each is trained on rightly, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from srde_ds.data.inputs import read_records
from srde_ds.data.packing import check_markers, prompt_ids, tokenize
from srde_ds.errors import SRDEError
from srde_ds.inference.prompts import read_prompts
from tests.templates import FAMILIES

CASES = Path(__file__).parents[1] / "fixtures" / "data_cases"
CHATML_TOOLS = "chatml, tools"
CALL = '<tool_call>\n{"name": "w", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
FINAL = "<|channel|>final<|message|>"


def labelled(file: str, family: str) -> tuple[str, list[str]]:
    """The whole text of the file's document, and what of it is labelled, run by run."""
    tokenizer = FAMILIES[family].tokenizer()
    (record,) = read_records(CASES / file, ["math"])
    check_markers(tokenizer, record)
    (document,) = tokenize([record], tokenizer)
    runs: list[list[int]] = []
    for index, token in enumerate(document.input_ids.tolist()):
        if document.is_response[index]:
            if not document.is_response[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return str(tokenizer.decode(document.input_ids)), [str(tokenizer.decode(run)) for run in runs]


@pytest.mark.parametrize(
    ("file", "family", "expected"),
    [
        ("reasoning_content.jsonl", "qwen, thinking", ["7*8=56\n</think>\n\n56<|im_end|>"]),
        ("reasoning.jsonl", "ministral", ["[THINK]7*8=56[/THINK]56</s>"]),
        ("turn_weight_0.jsonl", "chatml", ["4<|im_end|>"]),
        ("turn_train_false.jsonl", "chatml", ["4<|im_end|>"]),
        ("tool_1.jsonl", CHATML_TOOLS, [f"Let me look.{CALL}", "22C in Rome<|im_end|>"]),
        ("tool_2.jsonl", CHATML_TOOLS, [CALL, "22C<|im_end|>"]),
        ("tool_4.jsonl", CHATML_TOOLS, [f"Let me look.{CALL}"]),
        ("tool_5.jsonl", CHATML_TOOLS, [f"Let me look.{CALL}", "22C<|im_end|>"]),
        ("content_parts.jsonl", "chatml", ["Yo<|im_end|>"]),
        ("think_block.jsonl", "qwen, thinking", ["t\n</think>\n\n4<|im_end|>"]),
        ("think_bare.jsonl", "qwen, thinking", ["\n</think>\n\n4<|im_end|>"]),
        ("channel_one_turn.jsonl", "last channel", ["<|channel|>final<|message|>4<|end|>"]),
        ("channel_two_turns.jsonl", "last channel", ["<|message|>4<|end|>", "<|channel|>final<|message|>6<|end|>"]),
        ("channel_two_turns.jsonl", "gpt-oss", [f"{FINAL}4<|end|>", f"{FINAL}6<|return|>"]),
        ("trailing_newline.jsonl", "chatml", ["4\n<|im_end|>", "6<|im_end|>"]),
        ("phi3_two_turns.jsonl", "phi-3", ["4<|end|>", "6<|end|>\n<|endoftext|>"]),
    ],
)  # fmt: skip
def test_labels(file: str, family: str, expected: list[str]) -> None:
    assert labelled(file, family)[1] == expected


def test_system_messages() -> None:
    # This template writes a system message of its own where there is none.
    text, runs = labelled("empty_system.jsonl", "chatml")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi") and runs == ["yo<|im_end|>"]
    text, runs = labelled("top_level_system.jsonl", "chatml")
    assert text.startswith("<|im_start|>system\nTalk like a pirate.<|im_end|>\n<|im_start|>user\nhi")
    assert runs == ["yo<|im_end|>"]


def test_tools_are_in_the_prompt() -> None:
    text, _ = labelled("tool_1.jsonl", CHATML_TOOLS)
    assert '<tools>{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}</tools>' in text
    assert "<|im_start|>user\n<tool_response>\n22C\n</tool_response><|im_end|>" in text


@pytest.mark.parametrize(
    ("file", "family", "message"),
    [
        ("reasoning_content.jsonl", "chatml", r"does not write a thought \('reasoning_content'\)"),
        ("reasoning.jsonl", "chatml", r"does not write a thought \('reasoning_content'\)"),
        ("tool_1.jsonl", "chatml", r"does not write tool calls \('tool_calls'\)"),
        ("tool_2.jsonl", "mistral", r"does not write tool calls \('tool_calls'\)"),
        ("tool_4.jsonl", "gemma", r"does not write tool calls \('tool_calls'\)"),
        ("image_part.jsonl", "chatml", r"messages\[0\]: content\[1\]: a part of type 'image_url' is not supported"),
        ("surrogate.jsonl", "chatml", "field 'prompt' holds half a surrogate pair"),
        ("think_multi_turn.jsonl", "qwen, thinking", "writes an earlier turn .* --train_on last"),
        ("think_bare.jsonl", "deepseek-r1", "does not continue its generation prompt"),
        ("think_bare.jsonl", "nemotron", "does not continue its generation prompt"),
        ("turn_end_in_response.jsonl", "chatml, another EOS", r"holds the tokenizer's end of turn '<\|im_end\|>'"),
        ("turn_end_in_response.jsonl", "chatml", r"holds the tokenizer's EOS token '<\|im_end\|>'"),
        ("top_level_system.jsonl", "gemma", "System role not supported.* write that into the first user message"),
    ],
)
def test_refusals(file: str, family: str, message: str) -> None:
    with pytest.raises(SRDEError, match=message) as refused:
        labelled(file, family)
    assert str(refused.value).startswith(f"{CASES / file}:1: ") and "\n" not in str(refused.value)


def test_an_earlier_thought_that_the_template_drops_leaves_the_last_turn() -> None:
    tokenizer = FAMILIES["qwen, thinking"].tokenizer()
    (record,) = read_records(CASES / "think_multi_turn.jsonl", ["math"], train_on="last")
    (document,) = tokenize([record], tokenizer)
    assert tokenizer.decode(document.input_ids[document.is_response]) == "\n</think>\n\n6<|im_end|>"
    assert "<|im_start|>assistant\n4<|im_end|>" in tokenizer.decode(document.input_ids)


def test_prompts() -> None:
    with pytest.raises(SRDEError, match="prompts_surrogate.jsonl:1: field 'prompt' holds half a surrogate pair"):
        read_prompts(CASES / "prompts_surrogate.jsonl")
    with pytest.raises(SRDEError, match="prompts_tool.jsonl:1: field 'tools' must be a list of objects"):
        read_prompts(CASES / "prompts_tool.jsonl")
    assert [messages for _, messages, _ in read_prompts(CASES / "PROMPTS_UPPER.JSONL")] == asked("What is 7*8?")
    assert [messages for _, messages, _ in read_prompts(CASES / "prompts_bom.txt")] == asked(
        "What is 7*8?", "What is 2+2?"
    )


def test_calls_in_prompts_are_written_as_in_training() -> None:
    tokenizer = FAMILIES[CHATML_TOOLS].tokenizer()
    (record,) = read_records(CASES / "tool_1.jsonl", ["math"])
    asked_for = record.messages[:3]
    text = str(tokenizer.decode(prompt_ids(tokenizer, asked_for, tools=record.tools)))
    assert text.endswith(
        f"{CALL}\n<|im_start|>user\n<tool_response>\n22C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]
