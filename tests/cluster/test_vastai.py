"""cluster/vastai_startup.sh on a machine that has no GPUs, with local sources and a stand-in for the Hub."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data_helpers import sums, write_jsonl
from tests.distributed.training_helpers import DOMAINS, Inputs
from tests.hub_standin import standin

ROOT = Path(__file__).parents[2]
TOKEN = "hf_neverToBeSeenAnywhere"


@pytest.fixture
def heard() -> Iterator[tuple[str, list[str]]]:
    """A webhook's URL, and the states that it has been told."""
    texts: list[str] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/secretPath", texts
        server.shutdown()


def start(folder: Path, inputs: Inputs, url: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The script, in an environment that has only what it documents."""
    shown = folder / "programs"
    shown.mkdir(exist_ok=True)
    (shown / "nvidia-smi").write_text("#!/bin/sh\n")  # lists no GPU
    (shown / "nvidia-smi").chmod(0o755)
    sources = {
        name: [{"name": name, "jsonl": f"{folder}/{name}.jsonl", "formatter": "prompt_response"}] for name in DOMAINS
    }
    (folder / "sources.yaml").write_text(json.dumps(sources))
    for name in DOMAINS:
        write_jsonl(folder / f"{name}.jsonl", sums(name, range(60)))
    training = "--num_experts 3 --top_k 2 --density 0.05 --bf16 false --warmup_steps 0 --save_steps 2 --batch_size 2"
    variables = {
        "PATH": f"{shown}:/usr/bin:/bin",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "ENVIRONMENT": str(Path(sys.executable).parents[1]),
        "MODEL_NAME": inputs.base,
        "EXAMPLES_PER_DOMAIN": "40",
        "MAX_STEPS": "4",
        "MAX_LENGTH": "96",
        "OUTPUT_DIR": str(folder / "run"),
        "WORK_DIR": str(folder / "data"),
        "SOURCES_FILE": str(folder / "sources.yaml"),
        "TRAIN_ARGUMENTS": f"{training} --gradient_accumulation_steps 1 --eval_steps 0 --domains {','.join(DOMAINS)}",
        "MAX_RESTARTS": "0",
        "HF_TOKEN": TOKEN,
        "WEBHOOK_URL": url,
    }
    command = ["bash", "cluster/vastai_startup.sh"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=variables | changes,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )


def test_from_sources_to_uploaded_weights_and_again(
    inputs: Inputs, heard: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, texts = heard
    failed = start(tmp_path, inputs, url, TRAIN_ARGUMENTS="--no_such_flag 1")
    assert failed.returncode == 2, failed.stdout
    assert "training ended with status 2" in failed.stdout and texts[-1].startswith("[failed] training")
    data = (tmp_path / "data/tokenized/manifest.json").stat().st_mtime_ns

    with standin() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        done = start(tmp_path, inputs, url, UPLOAD_REPO="someone/experts", CONVERT_TO="moe", **variables)
    assert done.returncode == 0, done.stdout
    run = tmp_path / "run"
    assert json.loads((run / "completed.json").read_text())["step"] == 4
    assert (tmp_path / "data/tokenized/manifest.json").stat().st_mtime_ns == data  # built once
    assert (run / "converted-moe/config.json").exists()
    assert hub.private == {"someone/experts": True} and hub.tokens == {f"Bearer {TOKEN}"}
    assert {"srde_weights.safetensors", "config.json"} <= hub.files["someone/experts"].keys()
    assert texts[-1].startswith("[done] results: ")
    weights = (run / "srde_weights.safetensors").stat().st_mtime_ns

    again = start(tmp_path, inputs, url)
    assert again.returncode == 0 and "the run has already finished" in again.stdout, again.stdout
    assert (run / "srde_weights.safetensors").stat().st_mtime_ns == weights

    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (TOKEN, "secretPath"):
        assert secret not in failed.stdout + done.stdout + again.stdout
        assert secret.encode() not in written


def test_a_public_repository_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    environment = Path(sys.executable).parents[1]
    folders = {"ENVIRONMENT": environment, "OUTPUT_DIR": tmp_path / "run", "WORK_DIR": tmp_path / "data"}
    variables = os.environ | {name: str(folder) for name, folder in folders.items()} | {"HF_TOKEN": TOKEN}
    with standin() as hub:
        hub.add("someone/experts", {})
        variables |= {"HF_ENDPOINT": hub.endpoint, "UPLOAD_REPO": "someone/experts"}
        command = ["bash", "cluster/vastai_startup.sh"]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "the repository exists and is public" in done.stderr, done
    assert "upload's check ended with status 1" in done.stdout and not list((tmp_path / "data").glob("[!.]*"))


SRDE_DS = """#!/bin/sh
case $1 in
    supervise) echo "$MAX_STEPS" > "$OUTPUT_DIR/srde_weights.safetensors" ;;
    convert) mkdir "$OUTPUT_DIR/partial-converted-moe"
        cp "$OUTPUT_DIR/srde_weights.safetensors" "$OUTPUT_DIR/partial-converted-moe/of" ;;
esac
"""


def test_a_continued_run_is_converted_again(tmp_path: Path) -> None:
    """With a stand-in for srde-ds that writes the number of steps in place of weights."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srde-ds").write_text(SRDE_DS)
    (tmp_path / "bin/srde-ds").chmod(0o755)
    (tmp_path / "data/tokenized").mkdir(parents=True)
    (tmp_path / "data/tokenized/manifest.json").touch()
    folders = {"ENVIRONMENT": tmp_path, "OUTPUT_DIR": tmp_path / "run", "WORK_DIR": tmp_path / "data"}
    variables = os.environ | {name: str(folder) for name, folder in folders.items()} | {"CONVERT_TO": "moe"}
    converted = tmp_path / "run/converted-moe"
    for steps in ("4", "6"):
        environment = variables | {"MAX_STEPS": steps}
        subprocess.run(["bash", "cluster/vastai_startup.sh"], cwd=ROOT, env=environment, check=True)
        assert [(path.name, path.read_text().strip()) for path in converted.iterdir()] == [("of", steps)]
        time.sleep(0.05)  # more than the resolution of file times
