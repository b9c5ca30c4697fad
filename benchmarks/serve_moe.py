"""Does an inference server give the tokens of the experts? The exported mixture of experts, served on loopback.

python -m benchmarks.serve_moe --server transformers \\
    --start "transformers serve {model} --host 127.0.0.1 --port {port} --device cpu --dtype float32"
python -m benchmarks.serve_moe --server vllm --start "vllm serve {model} --host 127.0.0.1 --port {port} --dtype float32"
python -m benchmarks.serve_moe --server llama.cpp --gguf_converter llama.cpp/convert_hf_to_gguf.py \\
    --start "llama-server --model {model} --host 127.0.0.1 --port {port}"

Experts are random (or those of --checkpoint), answers are greedy, in float32. Writes
benchmarks/results/serve_moe_<server>_<base>.json and the table of all such files in docs/convert.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.tables import markdown, measured_on, put_into
from srde_ds.export.command import convert_command
from srde_ds.export.options import ConvertOptions
from srde_ds.model.adapter import SRDEModel, load_adapter
from tests.convert_helpers import trained  # random experts, as the tests have them

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"

PROMPTS = ["What is 17 * 3?", "Name three colours.", "Write a line of Python that prints the squares of 1 to 5."]
NEW_TOKENS = 24
START_SECONDS = 600


def greedy(model: SRDEModel, tokenizer: Any, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    answer = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server in a process group of its own, which is ended with the block."""
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield server
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_SECONDS):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}, see {log}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise SystemExit(f"{url} did not answer within {START_SECONDS} s")


def asked(url: str, model: str, messages: list[dict[str, str]], **options: Any) -> list[str]:
    """A server's answers to a conversation."""
    body = {"model": model, "messages": messages, **options}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return [str(choice["message"]["content"]) for choice in json.load(answer)["choices"]]


def served(url: str, model: str, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    return asked(url, model, chat, max_tokens=NEW_TOKENS, temperature=0, seed=0)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="its name, for the record")
    parser.add_argument("--start", required=True, help="command with {model} and {port}")
    parser.add_argument("--version", default="", help="of the server, for the record")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--base_name", default="SmolLM2-135M", help="for the record")
    parser.add_argument("--checkpoint", help="trained experts; default: random ones")
    parser.add_argument("--gguf_converter", help="serve a GGUF file made by this script of llama.cpp")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = options.checkpoint or str(trained(options.base, folder, density=0.01, scale=0.05).weights)
        model = load_adapter(_weights(checkpoint, folder), base=str(options.base))
        tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
        target = convert_command(
            ConvertOptions(
                checkpoint,
                to="gguf" if options.gguf_converter else "moe",
                output=str(folder / "served"),
                dtype="float32",
                base=str(options.base),
                gguf_converter=options.gguf_converter,
            )
        )
        port, rows = free_port(), []
        command = [part.format(model=target, port=port) for part in shlex.split(options.start)]
        log = folder / "server.log"
        started = time.perf_counter()
        with running(command, log) as server:
            wait_for(f"http://127.0.0.1:{port}/v1/models", server, log)
            ready = time.perf_counter() - started
            for prompt in PROMPTS:
                theirs = served(f"http://127.0.0.1:{port}/v1/chat/completions", str(target), prompt)
                ours = greedy(model, tokenizer, prompt)
                with model.no_experts():
                    bare = greedy(model, tokenizer, prompt)
                rows.append({"prompt": prompt, "srde": ours, "server": theirs, "base": bare})
                print(f"{'same' if ours == theirs else 'OTHER':<6}{prompt}\n   srde   {ours!r}\n   server {theirs!r}\n")
    kept = measured_on()
    record = {
        "server": options.server,
        "base": options.base_name,
        "version": options.version,
        "command": options.start,
        "experts": options.checkpoint or "random",
        "same": sum(row["srde"] == row["server"] for row in rows),
        "of": len(rows),
        "seconds_to_ready": ready,
        "answers": rows,
        "environment": kept,
    }
    name = f"serve_moe_{options.server}_{options.base_name}".lower().replace(" ", "-")
    result = RESULTS / f"{name}.json"
    result.write_text(json.dumps(record, indent=1) + "\n")
    put_into("convert.md", "served", table())
    print(f"{record['same']} of {record['of']} answers are the same; {result}")


def table() -> str:
    """All results, a line each."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("serve_moe_*.json"))]
    rows = [
        [record["base"], record["server"], record["version"], f"{record['same']} of {record['of']}"]
        for record in sorted(records, key=lambda record: (record["base"] != "SmolLM2-135M", record["base"]))
    ]
    return markdown(["Base", "Server", "Version", "Same answers"], rows)


def _weights(checkpoint: str, folder: Path) -> Path:
    path = Path(checkpoint)
    if path.is_file():
        return path
    return convert_command(ConvertOptions(checkpoint, output=str(folder / "weights")))


if __name__ == "__main__":
    main()
