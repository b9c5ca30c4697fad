"""The same small inputs, as a user meets them: through the commands, with a tiny base on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from srde_ds.cli.main import main
from srde_ds.data.manifest import load_manifest, load_rows
from tests.cli_helpers import fails, flags
from tests.data_helpers import write_jsonl
from tests.evaluation_helpers import save_model
from tests.helpers import tiny_llama
from tests.hybrids import HYBRIDS
from tests.templates import FAMILIES

CASES = Path(__file__).parents[1] / "fixtures" / "data_cases"
CALL = '<tool_call>\n{"name": "w", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
FINAL = "<|channel|>final<|message|>"
THOUGHT = r"does not write a thought ('reasoning_content')"
CALLS = r"does not write tool calls ('tool_calls')"
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A folder with a tiny base and the tokenizer of a family."""
    folder = tmp_path_factory.mktemp("bases")

    def save(family: str) -> Path:
        base = folder / family.replace(" ", "_")
        if not base.exists():
            tokenizer = FAMILIES[family].tokenizer()
            tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(base)
            tokenizer.save_pretrained(base)
        return base

    return save


def build(base: Path, work_dir: Path, name: str, **options: Any) -> list[str]:
    given = {"model_name": base, "work_dir": work_dir, "max_length": 512, "domains": "math", "jsonl_data": CASES / name}
    return ["build_dataset", *flags(given | options)]


def labelled(base: Path, work_dir: Path) -> list[str]:
    """The labelled runs of all rows of a dataset, decoded and sorted: packing shuffles documents."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = work_dir / "tokenized"
    runs: list[list[int]] = []
    for row in load_rows(folder, "train", load_manifest(folder)):
        before = -100
        for label in row["labels"]:
            if label != -100:
                if before == -100:
                    runs.append([])
                runs[-1].append(label)
            before = label
    return sorted(str(tokenizer.decode(run)) for run in runs)


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("reasoning_content.jsonl", "qwen, thinking", ["7*8=56\n</think>\n\n56<|im_end|>"]),
        ("reasoning.jsonl", "ministral", ["[THINK]7*8=56[/THINK]56</s>"]),
        ("turn_weight_0.jsonl", "chatml", ["4<|im_end|>"]),
        ("turn_train_false.jsonl", "chatml", ["4<|im_end|>"]),
        ("tool_1.jsonl", "chatml, tools", ["22C in Rome<|im_end|>", f"Let me look.{CALL}"]),
        ("tool_2.jsonl", "chatml, tools", ["22C<|im_end|>", CALL]),
        ("tool_4.jsonl", "chatml, tools", [f"Let me look.{CALL}"]),
        ("tool_5.jsonl", "chatml, tools", ["22C<|im_end|>", f"Let me look.{CALL}"]),
        ("empty_system.jsonl", "chatml", ["yo<|im_end|>"]),
        ("top_level_system.jsonl", "chatml", ["yo<|im_end|>"]),
        ("sharegpt.jsonl", "chatml", ["56<|im_end|>"]),
        ("pretty_array.json", "chatml", ["56<|im_end|>", "63<|im_end|>"]),
        ("array_one_line.json", "chatml", ["56<|im_end|>", "63<|im_end|>"]),
        ("table.csv", "chatml", ["五十六<|im_end|>", "六十三<|im_end|>"]),
        ("plain.jsonl.gz", "chatml", ["五十六<|im_end|>"]),
        ("bom_crlf.jsonl", "chatml", ["五十六<|im_end|>", "六十三<|im_end|>"]),
        ("utf16.jsonl", "chatml", ["五十六<|im_end|>", "六十三<|im_end|>"]),
        ("content_parts.jsonl", "chatml", ["Yo<|im_end|>"]),
        ("think_block.jsonl", "qwen, thinking", ["t\n</think>\n\n4<|im_end|>"]),
        ("think_bare.jsonl", "qwen, thinking", ["\n</think>\n\n4<|im_end|>"]),
        ("channel_one_turn.jsonl", "last channel", ["<|channel|>final<|message|>4<|end|>"]),
        ("channel_two_turns.jsonl", "last channel", [f"{FINAL}6<|end|>", "<|message|>4<|end|>"]),
        ("channel_two_turns.jsonl", "gpt-oss", [f"{FINAL}4<|end|>", f"{FINAL}6<|return|>"]),
        ("trailing_newline.jsonl", "chatml", ["4\n<|im_end|>", "6<|im_end|>"]),
        ("phi3_two_turns.jsonl", "phi-3", ["4<|end|>", "6<|end|>\n<|endoftext|>"]),
    ],
)  # fmt: skip
def test_what_is_trained_on(bases: Bases, tmp_path: Path, name: str, family: str, expected: list[str]) -> None:
    assert main(build(bases(family), tmp_path, name)) == 0
    assert labelled(bases(family), tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "family", "fragments"),
    [
        ("reasoning_content.jsonl", "chatml", [":1: ", THOUGHT]),
        ("reasoning.jsonl", "chatml", [":1: ", THOUGHT]),
        ("tool_1.jsonl", "chatml", [":1: ", CALLS]),
        ("tool_2.jsonl", "mistral", [":1: ", CALLS]),
        ("tool_4.jsonl", "gemma", [":1: ", CALLS]),
        ("tool_5.jsonl", "phi-3", [":1: ", CALLS]),
        ("image_part.jsonl", "chatml", [":1: messages[0]: content[1]: a part of type 'image_url' is not supported"]),
        ("surrogate.jsonl", "chatml", [":1: ", "half a surrogate pair"]),
        ("gbk.jsonl", "chatml", ["not UTF-8, looks like GBK: give --encoding gbk"]),
        ("think_multi_turn.jsonl", "qwen, thinking", [":1: ", "--train_on last"]),
        ("think_bare.jsonl", "deepseek-r1", [":1: ", "does not continue its generation prompt"]),
        ("turn_end_in_response.jsonl", "chatml, another EOS", [":1: ", "end of turn '<|im_end|>'"]),
        ("turn_end_in_response.jsonl", "chatml", [":1: ", "EOS token '<|im_end|>'"]),
        ("top_level_system.jsonl", "gemma", [":1: ", "System role not supported", "into the first user message"]),
    ],
)
def test_what_is_refused_in_one_line(
    bases: Bases, tmp_path: Path, name: str, family: str, fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, build(bases(family), tmp_path / "data", name), name, *fragments)
    assert not (tmp_path / "data" / "tokenized").exists()


def test_another_encoding_and_the_last_turn_alone(bases: Bases, tmp_path: Path) -> None:
    chatml, thinking = bases("chatml"), bases("qwen, thinking")
    assert main(build(chatml, tmp_path / "gbk", "gbk.jsonl", encoding="gbk")) == 0
    assert labelled(chatml, tmp_path / "gbk") == ["五十六<|im_end|>"]
    assert main(build(thinking, tmp_path / "last", "think_multi_turn.jsonl", train_on="last")) == 0
    assert labelled(thinking, tmp_path / "last") == ["\n</think>\n\n6<|im_end|>"]


def test_a_source_keeps_which_turns_count(bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "sources.yaml").write_text(
        f"math: [{{name: own, jsonl: {CASES / 'source_weight.jsonl'}, formatter: messages}}]"
    )
    options = {"model_name": bases("chatml"), "work_dir": tmp_path / "data", "max_length": 512, "domains": "math"}
    options |= {"sources_file": tmp_path / "sources.yaml", "examples_per_domain": 1, "validation_fraction": 0}
    assert main(["build_dataset", *flags(options | {"test_fraction": 0})]) == 0
    assert labelled(bases("chatml"), tmp_path / "data") == ["4<|im_end|>"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prompts_bom.txt", ["What is 7*8?", "What is 2+2?"]),
        ("prompts_array.json", ["What is 7*8?", "What is 7*8?"]),
        ("PROMPTS_UPPER.JSONL", ["What is 7*8?"]),
    ],
)
def test_what_is_asked(weights: Path, tmp_path: Path, name: str, expected: list[str]) -> None:
    options = {"srde_weights": weights, "prompts_file": CASES / name, "output_file": tmp_path / "out.jsonl"}
    assert main(["inference", *flags(options | {"max_new_tokens": 1, "bf16": "false"})]) == 0
    answered = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in answered] == expected


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("prompts_surrogate.jsonl", ":1: field 'prompt' holds half a surrogate pair"),
        ("prompts_tool.jsonl", ":1: field 'tools' must be a list of objects"),
        ("tool_1.jsonl", f":1: the tokenizer's chat template {CALLS}"),
        ("reasoning_content.jsonl", ""),
    ],
)
def test_what_is_not_asked(
    weights: Path, tmp_path: Path, name: str, fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"srde_weights": weights, "prompts_file": CASES / name, "output_file": tmp_path / "out.jsonl"}
    arguments = ["inference", *flags(options | {"max_new_tokens": 1, "bf16": "false"})]
    if fragment:
        fails(capsys, arguments, name + fragment)
    else:  # the thought is the answer's, which is not asked
        assert main(arguments) == 0


def dry_run(base: Path, folder: Path, **options: Any) -> list[str]:
    given = {"model_name": base, "output_dir": folder / "run", "domains": "math", "max_steps": 2, "max_length": 128}
    data = write_jsonl(folder / "train.jsonl", [{"prompt": "2+2?", "response": "4"}])
    return ["train", *flags(given | {"jsonl_data": data, "dry_run": "true"} | options)]


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<one_more>"])
    tokenizer.save_pretrained(tmp_path / "base")
    told = (f"{len(tokenizer)} tokens, but its embedding has {len(tokenizer) - 1}", "resize_token_embeddings")
    arguments = dry_run(tmp_path / "base", tmp_path)
    fails(capsys, arguments, *told)
    with patch.dict("os.environ", {"DS_ACCELERATOR": "cpu"}):
        fails(capsys, arguments[:-2], *told)  # the run itself
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# The fifth of HYBRIDS, LFM2, has no gated feed-forward block by the names that experts attach to: refused earlier.
@pytest.mark.parametrize("family", [family for family in HYBRIDS if family != "lfm2"])
def test_a_base_that_carries_a_state_from_token_to_token(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    configuration = HYBRIDS[family]()
    configuration.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    fails(capsys, dry_run(tmp_path / "base", tmp_path), configuration.model_type, "--packing false")
    assert main(dry_run(tmp_path / "base", tmp_path, packing="false")) == 0


@pytest.mark.parametrize(
    ("template", "fragment"),
    [("{{ messages[0].content + 1 }}", "(TypeError)"), ("{{ raise_exception('no') }}", "refuses these messages: no")],
)
def test_a_template_that_raises(
    tmp_path: Path, template: str, fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = FAMILIES["plain"].tokenizer()
    tokenizer.chat_template = template
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    fails(capsys, build(tmp_path / "base", tmp_path / "data", "sharegpt.jsonl"), "sharegpt.jsonl:1: ", fragment)
    fails(capsys, dry_run(tmp_path / "base", tmp_path), "train.jsonl:1: ", fragment)
