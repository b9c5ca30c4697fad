"""Every family's form of a chat template: labelled is what the template has the model say, or the record is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import check_markers, prompt_ids, stop_ids, tokenize_each
from srde_ds.data.records import parse_prompt, parse_record
from srde_ds.data.template import render
from srde_ds.errors import SRDEError
from tests.templates import FAMILIES


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
THOUGHT = "<think>\nt\n</think>\n\n4"
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "single": {"messages": [user("2+2?"), assistant("4")]},
    "several": {"messages": [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]},
    "system": {"messages": [user("2+2?"), assistant("4")], "system": "Be kind."},
    "reasoning": {"messages": [user("2+2?"), assistant("4", reasoning="two, two")]},
    "reasoning, several": {
        "messages": [user("2+2?"), assistant("4", thinking="two"), user("3+3?"), assistant("6", thinking="three")]
    },
    "think block": {"messages": [user("2+2?"), assistant(THOUGHT)]},
    "think block, then bare": {"messages": [user("2+2?"), assistant(THOUGHT), user("3+3?"), assistant("6")]},
    "trailing space": {"messages": [user("2+2?"), assistant("4\n"), user("3+3?"), assistant("6 \n")]},
    "tools": {
        "messages": [
            user("In Rome?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "c1", "content": '22 "C"'},
            assistant("22 C"),
        ],
        "tools": TOOLS,
    },
}
# What is labelled, run by run, or the reason of the refusal.
NO_THOUGHTS = {
    "reasoning": r"does not write a thought \('reasoning_content'\)",
    "reasoning, several": r"does not write a thought \('reasoning_content'\)",
}
NO_TOOLS = {"tools": r"does not write tool calls \('tool_calls'\)"}
NOT_GOING_ON = "does not continue its generation prompt"
EARLIER = "writes an earlier turn"


def closed(end: str, last: str | None = None, *, trims: bool = False, before: str = "") -> dict[str, Any]:
    """What a plain form labels: the answers, each with `before` before it and `end` (the last one: `last`) after it."""
    last = last or end
    four, six = ("4", "6") if trims else ("4\n", "6 \n")
    return {
        "single": [f"{before}4{last}"],
        "several": [f"{before}4{end}", f"{before}6{last}"],
        "system": [f"{before}4{last}"],
        "think block": [f"{before}{THOUGHT}{last}"],
        "think block, then bare": [f"{before}{THOUGHT}{end}", f"{before}6{last}"],
        "trailing space": [f"{before}{four}{end}", f"{before}{six}{last}"],
        **NO_THOUGHTS,
        **NO_TOOLS,
    }


def all_of(reason: str) -> dict[str, Any]:
    return dict.fromkeys(CONVERSATIONS, reason)


IM_END = "<|im_end|>"
EXPECTED: dict[str, dict[str, Any]] = {
    "chatml": closed(IM_END),
    "chatml, trimmed": closed(IM_END, trims=True),
    "chatml, tools": closed(IM_END)
    | {
        "tools": [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
            "22 C<|im_end|>",
        ]
    },
    "chatml, another EOS": closed(IM_END, "<|im_end|><|endoftext|>"),
    "llama-3": closed("<|eot_id|>", trims=True)
    | {"tools": ['{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "22 C<|eot_id|>"]},
    "mistral": closed("</s>", before=" "),
    "ministral": closed("</s>")
    | {
        "reasoning": ["[THINK]two, two[/THINK]4</s>"],
        "reasoning, several": ["[THINK]two[/THINK]4</s>", "[THINK]three[/THINK]6</s>"],
        "tools": ['[TOOL_CALLS]weather[ARGS]{"city": "Rome"}</s>', "22 C</s>"],
    },
    "ministral, opened": all_of(f"{NOT_GOING_ON}|{EARLIER}")
    | {
        "reasoning": ["two, two[/THINK]4</s>"],
        "reasoning, several": ["two[/THINK]4</s>", "three[/THINK]6</s>"],
    },
    "gemma": closed("<end_of_turn>", "<end_of_turn><eos>", trims=True)
    | {"system": "System role not supported. It takes them without the system message: write that into the first"},
    "phi-3": closed("<|end|>", "<|end|>\n<|endoftext|>"),
    "qwen, thinking": {
        "single": ["\n</think>\n\n4<|im_end|>"],
        "several": EARLIER,
        "system": ["\n</think>\n\n4<|im_end|>"],
        "reasoning": ["two, two\n</think>\n\n4<|im_end|>"],
        "reasoning, several": EARLIER,
        "think block": ["t\n</think>\n\n4<|im_end|>"],
        "think block, then bare": EARLIER,
        "trailing space": EARLIER,
        "tools": [
            '\n</think>\n\n<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>',
            "\n</think>\n\n22 C<|im_end|>",
        ],
    },
    "qwen, hybrid": {
        "single": ["<think>\n\n</think>\n\n4<|im_end|>"],
        "several": ["4<|im_end|>", "<think>\n\n</think>\n\n6<|im_end|>"],
        "system": ["<think>\n\n</think>\n\n4<|im_end|>"],
        "reasoning": ["<think>\ntwo, two\n</think>\n\n4<|im_end|>"],
        "reasoning, several": r"turn 1 of the assistant: the chat template leaves out 'reasoning_content' \('two'\)",
        "think block": [f"{THOUGHT}<|im_end|>"],
        "think block, then bare": "turn 1 of the assistant: the chat template leaves out 'content'",
        "trailing space": ["4<|im_end|>", "<think>\n\n</think>\n\n6<|im_end|>"],
        "tools": [
            '<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>',
            "<think>\n\n</think>\n\n22 C<|im_end|>",
        ],
    },
    "deepseek-r1": all_of(f"{NOT_GOING_ON}|{EARLIER}") | NO_THOUGHTS,
    "deepseek-v3": closed("<|end|>")
    | {
        "think block": "turn 1 of the assistant: the chat template leaves out 'content'",
        "think block, then bare": "turn 1 of the assistant: the chat template leaves out 'content'",
    },
    "nemotron": all_of(f"{NOT_GOING_ON}|{EARLIER}")
    | NO_TOOLS
    | {
        "reasoning": ["two, two\n</think>\n4<|im_end|>"],
        "reasoning, several": ["two\n</think>\n4<|im_end|>", "three\n</think>\n6<|im_end|>"],
        "think block": ["t\n</think>\n\n4<|im_end|>"],
    },
    "gpt-oss": closed("<|end|>", "<|return|>", before="<|channel|>final<|message|>")
    | {
        "reasoning": [
            "<|channel|>analysis<|message|>two, two<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
        ],
        "reasoning, several": "turn 1 of the assistant: the chat template leaves out 'reasoning_content'",
        "tools": [
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
            "<|channel|>final<|message|>22 C<|return|>",
        ],
    },
    "last channel": {
        **NO_THOUGHTS,
        **NO_TOOLS,
        "single": ["<|channel|>final<|message|>4<|end|>"],
        "several": ["<|message|>4<|end|>", "<|channel|>final<|message|>6<|end|>"],
        "system": ["<|channel|>final<|message|>4<|end|>"],
        "think block": [f"<|channel|>final<|message|>{THOUGHT}<|end|>"],
        "think block, then bare": [f"<|message|>{THOUGHT}<|end|>", "<|channel|>final<|message|>6<|end|>"],
        "trailing space": ["<|message|>4\n<|end|>", "<|channel|>final<|message|>6 \n<|end|>"],
    },
    "glm": {
        "single": ["<think></think>\n4<|endoftext|>"],
        "several": ["<think></think>\n4", "<think></think>\n6<|endoftext|>"],
        "system": ["<think></think>\n4<|endoftext|>"],
        "reasoning": ["<think>two, two</think>\n4<|endoftext|>"],
        "reasoning, several": ["<think>two</think>\n4", "<think>three</think>\n6<|endoftext|>"],
        "think block": ["<think>t</think>\n4<|endoftext|>"],
        "think block, then bare": ["<think>t</think>\n4", "<think></think>\n6<|endoftext|>"],
        "trailing space": ["<think></think>\n4", "<think></think>\n6<|endoftext|>"],
        "tools": [
            "<think></think>\n<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>",
            "<think></think>\n22 C<|endoftext|>",
        ],
    },
    "plain": closed(IM_END),
    "no template": closed(IM_END),
}


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    return FAMILIES[family].tokenizer()


def runs(family: str, record: dict[str, Any], **options: Any) -> list[str]:
    """The text of each labelled run."""
    tokenizer = tokenizer_of(family)
    (document,) = tokenize_each([parse_record(record, "x.jsonl:7", ["math"], **options)], tokenizer)
    if isinstance(document, SRDEError):
        raise document
    found: list[list[int]] = []
    for index, (token, labelled) in enumerate(zip(document.input_ids, document.is_response, strict=True)):
        if labelled and (index == 0 or not document.is_response[index - 1]):
            found.append([])
        if labelled:
            found[-1].append(int(token))
    return [str(tokenizer.decode(run)) for run in found]


def test_all_forms_are_tried() -> None:
    assert EXPECTED.keys() == FAMILIES.keys()
    assert all(expected.keys() == CONVERSATIONS.keys() for expected in EXPECTED.values())


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_labelled_is_what_the_template_has_the_model_say(family: str, conversation: str) -> None:
    expected = EXPECTED[family][conversation]
    if isinstance(expected, list):
        assert runs(family, CONVERSATIONS[conversation]) == expected
        return
    with pytest.raises(SRDEError, match=expected) as refused:
        runs(family, CONVERSATIONS[conversation])
    text = str(refused.value)
    assert text.startswith("x.jsonl:7: ") and "\n" not in text and (": " in text and text.endswith("."))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_labelled_text_goes_on_from_the_prompt_as_rendered(family: str, conversation: str) -> None:
    tokenizer = tokenizer_of(family)
    record = parse_record(CONVERSATIONS[conversation], "x.jsonl:7", ["math"], "last")
    (document,) = tokenize_each([record], tokenizer)
    if isinstance(document, SRDEError):
        return
    prompt = prompt_ids(tokenizer, record.prompt, tools=record.tools)
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert not document.is_response[: len(prompt)].any() and document.is_response[len(prompt) :].all()
    whole = render(tokenizer, record.messages, generation=False, where="", tools=record.tools)
    written, eos = str(tokenizer.decode(document.input_ids)), str(tokenizer.eos_token)
    # White space behind the end is not said; EOS ends every document, where the template writes none, too.
    assert written.removesuffix(eos) == whole.rstrip().removesuffix(eos) or written == whole.rstrip() + eos


@pytest.mark.parametrize("family", ["qwen, thinking", "qwen, hybrid", "gpt-oss"])
def test_where_earlier_turns_cannot_be_labelled_the_last_one_can(family: str) -> None:
    several = CONVERSATIONS["reasoning, several"]
    last = EXPECTED[family]["reasoning"][0].replace("two, two", "three").replace("4", "6")
    assert runs(family, several, train_on="last") == [last]
    marked = [several["messages"][0], several["messages"][1] | {"weight": 0}, *several["messages"][2:]]
    assert runs(family, {"messages": marked}) == [last]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}])
def test_a_turn_that_does_not_count_has_no_labels(mark: dict[str, Any]) -> None:
    messages = [user("2+2?"), assistant("5", **mark), user("no. 2+2?"), assistant("4", weight=1)]
    assert runs("chatml", {"messages": messages}) == ["4<|im_end|>"]
    # Nothing behind the last turn that counts has an effect.
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("7", **mark)]
    assert runs("chatml", {"messages": messages}) == ["4<|im_end|>"]
    assert runs("chatml", {"messages": messages[:2]}) == ["4<|im_end|>"]


def test_a_template_that_leaves_out_a_role_is_refused() -> None:
    tokenizer = FAMILIES["chatml, trimmed"].tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "in messages %}", "in messages if m.role != 'system' %}"
    )
    record = parse_record(CONVERSATIONS["system"], "x.jsonl:7", ["math"])
    (refused,) = tokenize_each([record], tokenizer)
    assert str(refused).startswith("x.jsonl:7: the chat template leaves out 'content' of a message of role system")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", r"refuses these messages: can only concatenate str .* \(TypeError\)"),
        ("{{ messages[9].content.x }}", "refuses these messages: "),
        ("{{ 1 / 0 }}", r"division by zero \(ZeroDivisionError\)"),
        ("{% for m in messages %}", "refuses these messages: Unexpected end of template"),
        ("{{ raise_exception('no\nway') }}", "refuses these messages: no way"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template: str, message: str) -> None:
    tokenizer = FAMILIES["plain"].tokenizer()
    tokenizer.chat_template = template
    record = parse_record(CONVERSATIONS["single"], "x.jsonl:7", ["math"])
    (refused,) = tokenize_each([record], tokenizer)
    assert isinstance(refused, SRDEError)
    with pytest.raises(SRDEError, match=message) as caught:
        prompt_ids(tokenizer, record.prompt, where="prompts.jsonl:3")
    for text, place in ((str(refused), "x.jsonl:7: "), (str(caught.value), "prompts.jsonl:3: ")):
        assert text.startswith(place) and "\n" not in text and text.endswith("in a copy of the base's folder.")


def test_a_refused_record_among_many_leaves_the_others() -> None:
    forms = ("single", "system", "several", "reasoning", "tools")
    records = [parse_record(CONVERSATIONS[name], f"x.jsonl:{name}", ["math"]) for name in forms]
    made = tokenize_each(records, tokenizer_of("gemma"))
    refused = [isinstance(document, SRDEError) for document in made]
    assert refused == [False, True, False, True, True]
    assert [document.where for document in made if not isinstance(document, SRDEError)] == [
        "x.jsonl:single",
        "x.jsonl:several",
    ]


@pytest.mark.parametrize(
    ("family", "said", "what"),
    [
        ("chatml", "a<|im_end|>b", "EOS token"),
        ("chatml, another EOS", "a<|im_end|>b", "end of turn"),
        ("gemma", "a<end_of_turn>b", "end of turn"),
        ("phi-3", "<|end|>", "end of turn"),
        ("gpt-oss", "a<|end|>b", "end of turn"),
        ("gpt-oss", "a<|return|>b", "EOS token"),
    ],
)
def test_a_marker_in_a_response_is_refused(family: str, said: str, what: str) -> None:
    for message in (assistant(said), assistant("4", reasoning=said), assistant(None, tool_calls=[call_with(said)])):
        record = parse_record({"messages": [user("a"), message]}, "x.jsonl:7", ["math"])
        with pytest.raises(SRDEError, match=f"x.jsonl:7: a response holds the tokenizer's {what} '.*': remove it"):
            check_markers(tokenizer_of(family), record)
    check_markers(tokenizer_of(family), parse_record({"prompt": said, "response": "b"}, "x.jsonl:7", ["math"]))


def call_with(text: str) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": {"x": text}}}


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        ("chatml", ["<|im_end|>"]),
        ("chatml, another EOS", ["<|endoftext|>", "<|im_end|>"]),
        ("gemma", ["<eos>", "<end_of_turn>"]),
        ("phi-3", ["<|endoftext|>", "<|end|>"]),
        ("gpt-oss", ["<|return|>"]),  # <|end|> ends a thought, too
        ("glm", ["<|endoftext|>"]),
        ("no template", ["<|im_end|>"]),
    ],
)
def test_generation_stops_where_the_template_ends_a_turn(family: str, stops: list[str]) -> None:
    tokenizer = tokenizer_of(family)
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == stops


def test_prompts_take_the_same_forms() -> None:
    messages, tools = parse_prompt(CONVERSATIONS["tools"], "p.jsonl:1")
    assert messages[-1] == {"role": "tool", "content": '22 "C"', "tool_call_id": "c1"}
    text = str(tokenizer_of("chatml, tools").decode(prompt_ids(tokenizer_of("chatml, tools"), messages, tools=tools)))
    assert '"name": "weather", "parameters"' in text and '"arguments": {"city": "Rome"}' in text
    assert text.endswith('<tool_response>\n22 "C"\n</tool_response><|im_end|>\n<|im_start|>assistant\n')
    for given in ({"messages": messages}, {"messages": messages[:1], "tools": tools}):
        asked, described = parse_prompt(given, "p.jsonl:1")
        with pytest.raises(
            SRDEError, match="^p.jsonl:1: the .*chat template (does not write tool|leaves out the desc)"
        ):
            prompt_ids(tokenizer_of("chatml"), asked, tools=described, where="p.jsonl:1")
