"""The registry and files of the same form: what they may say and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from srde_ds.cli.main import main
from srde_ds.config import DOMAINS
from srde_ds.data.sources.registry import Source, choose_domains, load_sources
from srde_ds.errors import SRDEError

OWN = """
law:
  - name: cases
    jsonl: cases.jsonl
    formatter: prompt_response
    columns: {prompt: question}
    license: cc0-1.0
    redistributable: "yes"
  - gsm8k
art:
  - {name: pictures, reasoning_gym: chain_sum, options: {max_terms: 3}, rows: 500, weight: 0.5}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_registry_names_each_domains_sources_and_their_terms() -> None:
    sources = load_sources()
    assert tuple(dict.fromkeys(source.domain for source in sources)) == DOMAINS
    hub = [source for source in sources if source.kind == "hub"]
    assert {source.hub for source in hub} == {
        "openai/gsm8k", "meta-math/MetaMathQA", "microsoft/orca-math-word-problems-200k", "lucasmccabe/logiqa",
        "metaeval/reclor", "Rowan/hellaswag", "sahil2801/CodeAlpaca-20k", "m-a-p/CodeFeedback-Filtered-Instruction",
        "allenai/sciq", "allenai/ai2_arc", "xw27/scibench", "deepmind/aqua_rat", "tasksource/Boardgame-QA",
        "ybisk/piqa", "allenai/winogrande",
    }  # fmt: skip
    assert all(source.license and source.redistributable in ("yes", "no", "unknown") and source.rows for source in hub)
    assert all(source.revision is None or len(source.revision) == 40 for source in hub)
    assert {source.name for source in hub if source.redistributable != "yes"} == {
        "logiqa",
        "reclor",
        "scibench",
        "piqa",
    }
    fills = [source for source in sources if source.weight == 0]
    assert [source.domain for source in fills] == list(DOMAINS) and all(source.generated for source in fills)


def test_a_file_adds_sources_and_domains_without_code(tmp_path: Path) -> None:
    sources = load_sources(write(tmp_path / "own.yaml", OWN))
    assert [(source.name, source.domain, source.kind) for source in sources] == [
        ("cases", "law", "jsonl"),
        ("gsm8k", "law", "hub"),
        ("pictures", "art", "reasoning_gym"),
    ]
    known = next(source for source in load_sources() if source.name == "gsm8k")
    assert sources[1] == Source(**vars(known) | {"domain": "law"})
    assert sources[0].real_columns() == ["question", "response"]
    assert [source.name for source in choose_domains(sources, ["art"])] == ["pictures"]
    with pytest.raises(SRDEError, match="no source of 'arts'. Did you mean 'art'?"):
        choose_domains(sources, ["arts"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b", "not valid YAML"),
        ("- a", "must map each domain to a list of sources"),
        ("a: b", "'a' must be a domain's name with a list of sources"),
        ("a: [gsm9k]", "no source 'gsm9k' in the registry. Did you mean 'gsm8k'?"),
        ("a: [{hub: x/y}]", "an entry of 'a' needs a name"),
        ("a: [{name: b, hub: x/y, formater: gsm8k}]", "unknown key 'formater'. Did you mean 'formatter'?"),
        ("a: [{name: b, hub: 3}]", "source 'b': hub=3 must be of type str"),
        ("a: [{name: b, hub: x/y, weight: heavy}]", "weight='heavy' must be of type float"),
        ("a: [{name: b, hub: x/y, ignore_columns: id}]", "ignore_columns='id' must be of type list"),
        ("a: [{name: b, hub: x/y, formatter: gsm8k, encoding: gbk}]", "encoding is only for jsonl: leave it out"),
        ("a: [{name: b, hub: x/y, near_duplicates: 1}]", "near_duplicates=1 must be of type bool"),
        ("a: [{name: b, hub: x/y, redistributable: yes}]", "redistributable=True must be of type str"),
        ("a: [{name: b}]", "needs exactly one of hub, folder, jsonl, parquet, reasoning_gym, tasks, has none"),
        ("a: [{name: b, hub: x/y, jsonl: z}]", "has hub, jsonl"),
        ("a: [{name: b, hub: x/y}]", "source 'b': needs a formatter"),
        ("a: [{name: b, tasks: math, formatter: gsm8k}]", "makes conversations by itself: leave formatter out"),
        ("a: [{name: b, hub: x/y, formatter: gsm}]", "unknown formatter 'gsm'. Did you mean 'gsm8k'?"),
        ("a: [{name: b, tasks: math, redistributable: maybe}]", "redistributable='maybe'"),
        ("a: [{name: b, tasks: math, weight: -1}]", "weight=-1: must be finite, and must not be negative"),
        ("a: [{name: b, tasks: math, weight: .nan}]", "weight=nan: must be finite"),
        ("a: [{name: b, tasks: math, weight: 0}]", "all sources of 'a' have weight 0"),
        ("a: [gsm8k, gsm8k]", "source 'gsm8k' occurs twice"),
        ("a: [gsm8k]\na: [sciq]", "line 2: 'a' occurs twice"),
        ("a: [{name: b, jsonl: z, jsonl: y, formatter: gsm8k}]", "line 1: 'jsonl' occurs twice"),
        ("a: [{name: b, jsonl: z, formatter: gsm8k, split: test}]", "split is only for hub, folder: leave it out"),
        ("a: [{name: b, tasks: math, options: {x: 1}}]", "options is only for reasoning_gym"),
        ("a: [{name: b, jsonl: z, formatter: gsm8k, columns: {qestion: q}}]", "does not read 'qestion'"),
        ("a: [{name: b, jsonl: z, formatter: gsm8k, columns: {question: 1}}]", "question=1 must be the name"),
        ("a: [{name: b, jsonl: z, formatter: by_keys, ignore_columns: ['*']}]", "ignore_columns: '*' must be the name"),
        (
            "a: [{name: b, jsonl: z, formatter: by_keys, ignore_columns: [[c]]}]",
            "ignore_columns: ['c'] must be the name",
        ),
        (
            "a: [{name: b, jsonl: z, formatter: gsm8k, columns: {question: q}, ignore_columns: [q]}]",
            "ignore_columns: columns reads 'q'. Name it in one of them.",
        ),
    ],
)
def test_what_no_source_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "own.yaml", text)
    with pytest.raises(SRDEError) as caught:
        load_sources(path)
    assert str(caught.value).startswith(f"sources_file={path}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match=r"sources_file=.*none\.yaml: cannot be read"):
        load_sources(tmp_path / "none.yaml")


def test_list_sources_shows_licence_size_columns_and_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build_dataset", "--list_sources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    reclor = next(line for line in lines if line.startswith("reclor"))
    for part in (
        "logic",
        "hub metaeval/reclor",
        "4,638",
        "non-commercial",
        " no ",
        "context, question, answers, label",
    ):
        assert part in reclor
    assert len(lines) == 1 + len(load_sources())
    path = write(tmp_path / "own.yaml", OWN)
    assert main(["build_dataset", "--list_sources", "--sources_file", str(path), "--domains", "art"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["source", "pictures"]
