"""Side by side in one process: the frozen base, PEFT's adapters and SRDE, forwards and backwards, in turns.

    python -m benchmarks.throughput --base FOLDER --base_name SmolLM2-135M --length 512
    python -m benchmarks.throughput --shape llama-250m --length 2048
    python -m benchmarks.throughput --shape tiny --length 32 --repeats 2      # a look whether it runs

Prints a table and adds to benchmarks/results/throughput.json. All methods share one frozen base of float32 or bfloat16
weights and the same loss code, without logits; adapters have as many values as SRDE. A round measures every case once;
figures are medians over rounds, ratios medians of those in each round. The optimizer's update is in none of them. In
the frozen base the gradient goes down to the embedding, as for adapters in every layer. "engine" is one process under
DeepSpeed ZeRO-3. The peak is that of activations and gradients, without weights. Utilisation counts the operations of
the forward and backward without recomputation, against the speed of a large matrix product on this machine.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.learning.rivals import lora, shira
from benchmarks.static import Operators
from benchmarks.tables import measured_on
from srde_ds.config import Config, resolve
from srde_ds.distributed.workload import Workload
from srde_ds.model.adapter import add_experts
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents
from srde_ds.model.base import enable_checkpointing, load_base
from srde_ds.model.base_shape import base_shape
from srde_ds.model.head import loss_without_logits
from srde_ds.model.targets import Targets, on_device
from srde_ds.optim.schedule import set_step
from srde_ds.planner.flops import step_flops
from srde_ds.utils.launcher import stop_processes
from srde_ds.utils.tables import markdown_table

RECORD = Path(__file__).resolve().parent / "results/throughput.json"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256},
    "llama-250m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "vocab_size": 32000},
}
SRDE: dict[str, dict[str, Any]] = {
    "SRDE neuron": {"neuron_parts": 1},
    "SRDE quarters of neurons": {"neuron_parts": 4},
    "SRDE random blocks": {"granularity": "block", "support_strategy": "random"},
    "SRDE single weights": {"granularity": "element", "support_strategy": "magnitude"},
}
DEFAULT = "SRDE quarters of neurons"
"""the form that users get if they ask for none"""
RIVALS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "PEFT LoRA, feed-forward": (lora, {}),
    "PEFT LoRA, all linear": (lora, {"target": "all"}),
    "PEFT SHiRA, feed-forward": (shira, {}),
}
METHODS = ("frozen base", *RIVALS, *SRDE)
DOCUMENT = 400  # tokens, of all but a row's last


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        base: a folder, or a key of SHAPES: random weights.
        methods: of METHODS.
        ways: "plain", "engine".
        checkpointing: with, without, or both in turn.
        rows, length: of the micro-batch.
        peak_tflops: of the device in this dtype; None: measured.
    """

    base: str
    methods: tuple[str, ...] = METHODS
    ways: tuple[str, ...] = ("plain", "engine")
    checkpointing: tuple[bool, ...] = (False, True)
    rows: int = 1
    length: int = 512
    density: float = 0.01
    experts: int = 6
    repeats: int = 5
    bf16: bool = False
    peak_tflops: float | None = None


@dataclass
class Case:
    """A method in a way.

    Attributes:
        step: forward and backward of the micro-batch; gives the loss.
        linear: torch's or DeepSpeed's, which replaces it in the whole process.
        flops: of a step, without recomputation.
    """

    method: str
    way: str
    checkpointing: bool
    step: Callable[[], Tensor]
    linear: Any
    trained: int
    flops: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.method}, {self.way}" + (", checkpointing" if self.checkpointing else "")


def batch_of(options: Options, vocabulary: int) -> dict[str, Tensor]:
    """Packed documents of random tokens, each a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (options.rows, options.length), generator=generator)
    positions = (torch.arange(options.length) % DOCUMENT).repeat(options.rows, 1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids, "token_mask": torch.ones_like(ids).bool()}


def config_of(options: Options, folder: str, method: str, checkpointing: bool) -> Config:
    """That of a run; of a rival that of SRDE with as many values."""
    flags = {
        "model_name": folder,
        "bf16": options.bf16,
        "num_experts": options.experts,
        "density": options.density,
        "max_length": options.length,
        "batch_size": options.rows,
        "gradient_accumulation_steps": 10**6,  # DeepSpeed's update is never due
        "gradient_checkpointing": checkpointing,
        "warmup_steps": 0,
    }
    return resolve({}, flags | SRDE.get(method, {}))


def plain_case(options: Options, base: PreTrainedModel, folder: str, method: str, checkpointing: bool) -> Case:
    """A method in a plain loop, with its own adapters around the shared weights of `base`."""
    config = config_of(options, folder, method, checkpointing)
    own = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    batch, device = batch_of(options, own.config.get_text_config().vocab_size), own.device
    documents = Documents.of(batch["position_ids"]).to(device)
    inputs: dict[str, Any] = {key: on_device(batch[key], device) for key in ("input_ids", "position_ids")}
    inputs |= {"documents": documents, "attention_mask": documents.no_mask}
    if method in SRDE:
        names = [f"expert{e}" for e in range(options.experts)]
        model = add_experts(own, config.adapter, expert_names=names, seed=0).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        mask = on_device(batch["token_mask"], device)

        def forward(targets: Targets) -> Tensor:
            loss: Tensor = model(**inputs, labels=targets, token_mask=mask).loss_sum
            return loss

    else:
        if method == "frozen base":
            own.enable_input_require_grads()
        else:
            put_in, flags = RIVALS[method]
            run: Any = SimpleNamespace(flags={"values_of": _values_of(options)} | flags, seed=0)
            put_in(own, run, None)
        own.train()
        if checkpointing:
            enable_checkpointing(own, use_reentrant=False)

        def forward(targets: Targets) -> Tensor:
            return loss_without_logits(own, inputs | {"use_cache": False}, targets)

    parameters = [p for p in own.parameters() if p.requires_grad]

    def step() -> Tensor:
        loss = forward(Targets.of(batch["labels"]).to(device))
        loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return loss

    values = sum(p.numel() for p in parameters)
    return Case(method, "plain", checkpointing, step, F.linear, values, _flops(config, method, values))


def engine_case(options: Options, folder: str, method: str, checkpointing: bool, *, updates: bool = False) -> Case:
    """SRDE under ZeRO-3 on one process; `updates`: with the optimizer's, after each micro-step."""
    from srde_ds.distributed.engine import build_engine, build_model  # plain loops need no deepspeed
    from srde_ds.distributed.processes import start_processes

    config = config_of(options, folder, method, checkpointing)
    if updates:
        config.training.gradient_accumulation_steps = 1
    before = F.linear
    topology = start_processes(600)
    engine = build_engine(build_model(config, topology), config, topology)
    batch = batch_of(options, engine.model.base.config.get_text_config().vocab_size)
    linear, F.linear = F.linear, before
    steps = itertools.count(1)

    def step() -> Tensor:
        set_step(engine.optimizer, next(steps))
        loss, _ = engine.forward(batch)
        engine.deepspeed.backward(loss)
        engine.deepspeed.step()  # counts the micro-step
        return loss

    values = sum(math.prod(parameter.srde_shape) for _, parameter in engine.model.trainable_parameters())
    return Case(method, "engine", checkpointing, step, linear, values, _flops(config, method, values))


def _values_of(options: Options) -> dict[str, Any]:
    return {"num_experts": options.experts, "density": options.density}


def _flops(config: Config, method: str, values: int) -> float:
    parts = step_flops(replace(Workload.of(config, 1), recomputed="none", micro_steps=1), base_shape(config))
    if method in SRDE:
        return sum(parts.values())
    adapters = 0 if method == "frozen base" else 6 * values * config.training.batch_size * config.data.max_length
    return parts["frozen base"] + parts["attention scores"] + adapters


def matrix_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large product, the best of some."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = min(timed(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds, until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(case: Case) -> int:
    """Most bytes of activations and gradients that are alive in a step."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.step()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with Operators() as found:
        case.step()
    return found.peak


def measure(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All cases in turns.

    Args:
        say: gets a line for each case that is ready, and for each round.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = _base_folder(options, Path(scratch))
        base: Any = load_base(folder, dtype=dtype, attn_implementation=DOCUMENT_ATTENTION)
        base = base.to(device)
        cases = []
        for checkpointing in options.checkpointing:
            for method in options.methods:
                cases.append(plain_case(options, base, folder, method, checkpointing))
                if "engine" in options.ways and method in SRDE:
                    cases.append(engine_case(options, folder, method, checkpointing))
        cases = [case for case in cases if case.way in options.ways or case.method == "frozen base"]
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        peaks, losses = {}, {}
        for case in cases:  # the first steps of ZeRO-3 only record in which order it must gather
            with patch.object(F, "linear", case.linear):
                losses[case.name] = float(case.step())
                case.step()
                peaks[case.name] = peak_of(case)
            say(f"ready: {case.name}")
        speed = options.peak_tflops * 1e12 if options.peak_tflops else matrix_speed(dtype, device)
        for number in range(options.repeats):
            for case in cases:
                with patch.object(F, "linear", case.linear):
                    seconds[case.name].append(timed(case.step))
            say(f"round {number + 1} of {options.repeats}")
    rows = [_row(case, seconds, peaks, losses, options, speed) for case in cases]
    name = options.base if options.base in SHAPES else Path(options.base).name
    return {
        "base_name": name,
        "options": asdict(options),
        "matrix_tflops": speed / 1e12,
        "cases": rows,
        "environment": measured_on() | {"threads": torch.get_num_threads()},
    }


def _row(
    case: Case,
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
    losses: dict[str, float],
    options: Options,
    speed: float,
) -> dict[str, Any]:
    own, middle = seconds[case.name], statistics.median(seconds[case.name])
    frozen = next(name for name in seconds if name.startswith("frozen") and ("check" in name) == case.checkpointing)
    ratios = [a / b for a, b in zip(own, seconds[frozen], strict=True)]
    return {
        "case": case.name,
        "method": case.method,
        "way": case.way,
        "checkpointing": case.checkpointing,
        "trained_values": case.trained,
        "loss": losses[case.name],
        "seconds": own,
        "median_seconds": middle,
        "tokens_per_second": options.rows * options.length / middle,
        "of_frozen": statistics.median(ratios),
        "peak_mib": peaks[case.name] / 2**20,
        "utilisation": case.flops / middle / speed,
    }


def _base_folder(options: Options, scratch: Path) -> str:
    if options.base not in SHAPES:
        return options.base
    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}
    shape: dict[str, Any] = SHAPES[options.base] | heads | {"max_position_embeddings": 8192}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(scratch / "base")
    return str(scratch / "base")


def table(result: dict[str, Any]) -> str:
    """The cases as a table in Markdown."""
    head = ["case", "trained values", "seconds", "tokens/s", "x frozen base", "peak, MiB", "utilisation"]
    lines = [
        [
            row["case"],
            f"{row['trained_values']:,}",
            f"{row['median_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_frozen']:.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['utilisation']:.0%}",
        ]
        for row in result["cases"]
    ]
    return markdown_table([head, *lines])


def record(result: dict[str, Any], path: Path) -> None:
    """Put a result into the file, in the place of an earlier one of the same options but for the repeats."""

    def key(one: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in one["options"].items() if name not in ("repeats", "base")}
        return kept | {"base": one["base_name"]}

    result = json.loads(json.dumps(result))
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    kept = [one for one in kept if key(one) != key(result)]
    path.write_text(json.dumps({"results": [*kept, result]}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--base", help="folder of a base")
    parser.add_argument("--base_name", help="what tables call the base")
    which.add_argument("--shape", choices=SHAPES, help="a Llama of random weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--ways", nargs="+", choices=("plain", "engine"), default=("plain", "engine"))
    parser.add_argument("--checkpointing", choices=("with", "without", "both"), default="both")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--peak_tflops", type=float)
    parser.add_argument("--output_file", type=Path, default=RECORD)
    given = vars(parser.parse_args(arguments))
    torch.set_num_threads(given.pop("threads"))
    base, shape, output, name = (given.pop(key) for key in ("base", "shape", "output_file", "base_name"))
    checkpointing = {"with": (True,), "without": (False,), "both": (False, True)}[given.pop("checkpointing")]
    given |= {"methods": tuple(given["methods"]), "ways": tuple(given["ways"])}
    result = measure(Options(base=base or shape, checkpointing=checkpointing, **given), lambda s: print(s, flush=True))
    if name:
        result["base_name"] = name
    print(table(result))
    record(result, output)
    stop_processes()


if __name__ == "__main__":
    main()
