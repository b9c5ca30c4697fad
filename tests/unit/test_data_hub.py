"""The Hub's real client against a stand-in of its HTTP interface: loading, faults, uploading."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants

from srde_ds.data.sources.hub import check_upload
from srde_ds.errors import SRDEError
from srde_ds.utils import retry
from srde_ds.utils.retry import SourceError, with_retries
from tests.data_helpers import tiny_tokenizer
from tests.hub_standin import Hub, standin

ROOT = Path(__file__).parents[2]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def sums(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {n} + 1?", "answer": f"We add.\n#### {n + 1}"} for n in range(count)]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with standin() as served:
        yield served


def run(hub: Hub, home: Path, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """`srde-ds build_dataset` in a process of its own: the client reads where the Hub is when it is imported."""
    program = (
        "import sys, srde_ds.utils.retry as retry; retry.WAITS = (0.01, 0.01)\n"
        "from srde_ds.cli.main import main; sys.exit(main(['build_dataset', *sys.argv[1:]]))"
    )
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    own["HF_HUB_DISABLE_XET"] = "1"  # the stand-in stores large files the older way
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | own
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def sources_file(path: Path, sources: dict[str, list[dict[str, Any]]]) -> str:
    path.write_text(json.dumps(sources))  # JSON is YAML
    return str(path)


def test_sources_are_loaded_retried_skipped_refilled_and_pushed(hub: Hub, tmp_path: Path) -> None:
    readme = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n---\n"
    sha = hub.add("openai/gsm8k", {"README.md": readme, "main/train-00000-of-00001.parquet": parquet(sums(40))})
    exported = {f"default/own-{split}.parquet": parquet(sums(60)[40:]) for split in ("train", "test")}
    pinned = hub.add("someone/exported", exported)
    hub.add("someone/busy", {"data/train-00000-of-00001.parquet": parquet(sums(80)[60:])})
    hub.faults["datasets/someone/busy"] = [429, 503]
    hub.add("someone/changed", {"data/train-00000-of-00001.parquet": parquet([{"question": "a", "reply": "b"}])})
    hub.add("someone/gated", {})
    hub.gated.add("someone/gated")
    entry = {"formatter": "gsm8k", "redistributable": "yes", "license": "mit", "near_duplicates": False}
    given = [
        {"name": "gsm8k", "hub": "openai/gsm8k", "config": "main"},
        {"name": "exported", "hub": "someone/exported", "revision": pinned, "data_files": "default/own-train.parquet"},
        {"name": "busy", "hub": "someone/busy"},
        {"name": "changed", "hub": "someone/changed"},
        {"name": "gated", "hub": "someone/gated"},
        {"name": "gone", "hub": "someone/gone"},
    ]
    own = sources_file(tmp_path / "own.yaml", {"math": [source | entry for source in given]})
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    work = tmp_path / "data"
    options = ["--sources_file", own, "--work_dir", str(work), "--examples_per_domain", "75", "--num_processes", "1"]
    options += ["--model_name", str(tmp_path / "base"), "--max_length", "256"]

    options += ["--on_missing_source", "skip", "--push_to_hub", "me/sums"]
    done = run(hub, tmp_path / "home", *options, token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("source busy: ") == 2 == done.stderr.count("trying again")
    build = json.loads((work / "build.json").read_text())
    assert build["domains"]["math"]["documents"] == 75 and build["domains"]["math"]["missing"] == 0
    assert build["domains"]["math"]["by_source"].keys() == {"gsm8k", "exported", "busy"}
    assert build["domains"]["math"]["by_source"]["gsm8k"] >= 35  # the others have 20 each
    assert build["skipped"].keys() == {"changed", "gated", "gone"}
    assert "no 'answer', only question, reply" in build["skipped"]["changed"]
    assert "GatedRepoError" in build["skipped"]["gated"] and "RepositoryNotFoundError" in build["skipped"]["gone"]
    assert json.loads((work / "sources.lock.json").read_text())["openai/gsm8k"] == sha
    report = (work / "report" / "report.md").read_text()
    assert "Source gated is missing" in report and sha[:12] in report

    entry |= {"name": "half", "hub": "openai/gsm8k", "config": "main", "split": "train[75%:]"}
    own = sources_file(tmp_path / "half.yaml", {"math": [entry]})
    half = ["--sources_file", own, "--work_dir", str(tmp_path / "half"), "--examples_per_domain", "10"]
    done = run(hub, tmp_path / "home", *half, "--num_processes", "1", "--skip_tokenize")
    assert done.returncode == 0, done.stderr
    last = [json.loads(line)["answer"] for line in (tmp_path / "half" / "data.jsonl").read_text().splitlines()]
    assert sorted(map(int, last)) == list(range(31, 41))

    hub.add("me/public", {})
    entry |= {"redistributable": "no"}  # passes, since the upload is to be private
    own = sources_file(tmp_path / "closed.yaml", {"math": [entry]})
    options = ["--sources_file", own, "--work_dir", str(tmp_path / "closed"), "--examples_per_domain", "10"]
    done = run(hub, tmp_path / "home", *options, "--skip_tokenize", "--push_to_hub", "me/public", token="hf_secret")
    assert done.returncode == 2 and "push_to_hub=me/public with private=true: the repository exists" in done.stderr
    assert not hub.files["me/public"] and not (tmp_path / "closed").exists()

    assert hub.private == {"me/sums": True} and hub.tokens == {"Bearer hf_secret"}
    uploaded = hub.files["me/sums"]
    kept = {str(path.relative_to(work)): path for path in work.rglob("*") if path.is_file()}
    assert {name for name in kept if not name.startswith("artifacts/")} == set(uploaded) - {".gitattributes"}
    for name, content in uploaded.items():
        assert name == ".gitattributes" or content == kept[name].read_bytes()
        assert b"hf_secret" not in content


def test_a_hub_out_of_reach_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.01, 0.01))
    with pytest.raises(SourceError, match="ConnectError after 3 tries"):
        with_retries(lambda: HfApi(endpoint="http://127.0.0.1:9").dataset_info("a/b"), "far")


def test_only_what_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry, "WAITS", (1.0, 4.0))
    monkeypatch.setattr(time, "sleep", waited.append)
    failures = [ConnectionError("no route"), TimeoutError("slow")]

    def load() -> str:
        if failures:
            raise failures.pop(0)
        return "rows"

    assert with_retries(load, "own") == "rows" and waited == [1.0, 4.0]
    assert "source own: no route; trying again in 1 s" in caplog.text

    def broken() -> str:
        raise ValueError("no such\nsplit")

    with pytest.raises(SourceError, match="^ValueError: no such split$"):
        with_retries(broken, "own")
    assert waited == [1.0, 4.0]

    def always() -> str:
        raise RuntimeError("wrapped") from ConnectionResetError()

    with pytest.raises(SourceError, match="RuntimeError after 3 tries: wrapped"):
        with_retries(always, "own")


def test_uploads_that_may_not_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free, closed = {"name": "gsm8k", "redistributable": "yes"}, {"name": "reclor", "redistributable": "no"}
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the Hub does not say by now passes
    check_upload("me/data", private=True, sources=[free, closed])
    check_upload("data", private=False, sources=[free])
    with pytest.raises(SRDEError, match="private=false: the licence of reclor does not allow"):
        check_upload("me/data", private=False, sources=[free, closed])
    with pytest.raises(SRDEError, match="push_to_hub=a/b/c: must be a repository's name"):
        check_upload("a/b/c", private=True, sources=[])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SRDEError, match="Set the environment variable HF_TOKEN"):
        check_upload("me/data", private=True, sources=[])
