"""Parts of a visit to a GPU, see gpu_visit.md; each prints a JSON line for each number as soon as it has it.

    python -m benchmarks.gpu_visit PART [--rehearse] [--output_file FILE]

`--rehearse`: tiny sizes on the CPU, to see that every part runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)

from benchmarks.tables import ROOT, measured_on
from benchmarks.throughput import DEFAULT, Case, Options, engine_case, matrix_speed, plain_case, timed
from srde_ds.config import AdapterConfig
from srde_ds.model import attach
from srde_ds.model.adapter import add_experts
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents, document_attention
from srde_ds.model.dispatch import LocalDispatch
from srde_ds.model.float8 import to_float8
from srde_ds.model.head import linear_cross_entropy
from srde_ds.utils.launcher import stop_processes
from srde_ds.utils.units import GIB

BASE = ROOT / "benchmarks/ministral_3_14b"
GPU_TESTS = ROOT / "tests/gpu"
IN_FP8 = "base in FP8"


class Visit:
    """Sizes, and where numbers go.

    Attributes:
        hidden, intermediate, tokens: of the parts that look at one layer.
        options: of the parts that run the whole model.
    """

    def __init__(self, *, rehearse: bool, output: Path, scratch: Path) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.rehearse, self.output, self.part = rehearse, output, ""
        self.hidden, self.intermediate, self.vocabulary = (64, 256, 512) if rehearse else (5120, 16384, 131072)
        self.heads, self.head_width = (4, 16) if rehearse else (32, 128)
        self.tokens = 64 if rehearse else 8192
        self.repeats = 2 if rehearse else 5
        base = str(BASE)
        if rehearse:
            base = str(scratch / "base")
            shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
            LlamaConfig(**shape, vocab_size=512, num_attention_heads=4, num_key_value_heads=2).save_pretrained(base)
        self.options = Options(
            base,
            checkpointing=(True,),
            rows=2,
            length=self.tokens // 2,
            density=0.05 if rehearse else 0.01,
            bf16=True,
        )

    def note(self, what: str, **numbers: Any) -> None:
        """A line in the file and on the screen, now."""
        line = json.dumps({"part": self.part, "what": what} | numbers)
        print(line, flush=True)
        with self.output.open("a") as file:
            file.write(line + "\n")

    def seconds(self, work: Callable[[], object]) -> float:
        """Median over the repeats, after one that does not count."""
        timed(work)
        return statistics.median(timed(work) for _ in range(self.repeats))

    def peak_gib(self, work: Callable[[], object]) -> float | None:
        """Of the device's allocator, all included; None on a CPU."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / GIB

    def random(self, *shape: int, gradient: bool = False) -> Tensor:
        """Standard normal in bfloat16."""
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device, requires_grad=gradient)


def machine(visit: Visit) -> None:
    """Versions, and the speed of products and copies."""
    visit.note("environment", **measured_on())
    visit.note("product, bf16", tflops=matrix_speed(torch.bfloat16, visit.device) / 1e12)
    for megabytes in (1, 64) if visit.rehearse else (64, 1024):
        source = torch.empty(megabytes * 2**20, dtype=torch.uint8, pin_memory=visit.device.type == "cuda")
        there = source.to(visit.device)
        for what, a, b in (("to the device", there, source), ("to the host", source, there)):
            seconds = visit.seconds(partial(a.copy_, b, non_blocking=True))
            visit.note(f"copy {what}", megabytes=megabytes, gb_s=megabytes * 2**20 / seconds / 1e9)
    if visit.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        size = 8192
        a, b = (torch.randn(size, size, device=visit.device).to(torch.float8_e4m3fn) for _ in range(2))
        rows, columns = torch.ones(size, 1, device=visit.device), torch.ones(1, size, device=visit.device)
        seconds = visit.seconds(lambda: torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16))
        visit.note("product, FP8, row-wise scales", tflops=2 * size**3 / seconds / 1e12)


def tests(visit: Visit) -> None:
    """tests/gpu, those first that start no further processes; on a CPU all of them are skipped."""
    files = sorted(GPU_TESTS.glob("test_*.py"), key=lambda path: path.name.startswith("test_memory"))
    # Not quiet, so that it has a line for each test; the last lines say why one failed.
    command = [sys.executable, "-u", "-m", "pytest", "-v", "--no-header", "-n", "0", *map(str, files)]
    summary, failed = "", []
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    wide = os.environ | {"COLUMNS": "500"}  # so that reasons are not cut
    with subprocess.Popen(command, cwd=ROOT, env=wide, **output) as pytest:
        assert pytest.stdout is not None
        for line in map(str.strip, pytest.stdout):
            if ended := re.match(r"\S*::(.+) (PASSED|FAILED|SKIPPED|ERROR)", line):
                visit.note(ended[1], result=ended[2].lower())
            elif line.startswith(("FAILED", "ERROR")):
                failed.append(line)
            elif line.startswith("="):
                summary = line.strip("= ")
    visit.note("tests/gpu", status=pytest.returncode, summary=summary, failed=failed)


def layer(visit: Visit) -> None:
    """One layer's attention, feed-forward block and loss: seconds of a forward and backward, errors, memory."""
    _attention(visit)
    _feed_forward(visit)
    _loss(visit)


def _attention(visit: Visit) -> None:
    rows, length = 2, visit.tokens // 2
    shape = rows, visit.heads, length, visit.head_width
    query, key, value = (visit.random(*shape, gradient=True) for _ in range(3))
    for documents in (1, 8):
        positions = (torch.arange(length) % (length // documents)).repeat(rows, 1)
        borders = Documents.of(positions).to(visit.device)
        number = (positions == 0).cumsum(1)
        mask = (number[:, None, :, None] == number[:, None, None, :]).tril().to(visit.device)

        def by_document(borders: Documents = borders) -> None:
            document_attention(nn.Module(), query, key, value, None, documents=borders)[0].sum().backward()

        def by_mask(mask: Tensor = mask) -> None:
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

        for what, work in (("by document", by_document), ("by a dense mask", by_mask)):
            visit.note(f"attention {what}", documents=documents, seconds=visit.seconds(work))


def _feed_forward(visit: Visit) -> None:
    experts, density = 6, visit.options.density
    forms: dict[str, dict[str, Any]] = {
        "neuron": {},
        "quarters of neurons": {"neuron_parts": 4},
        "block": {"granularity": "block"},
        "element": {"granularity": "element"},
    }
    for name, form in forms.items():
        config = LlamaConfig(
            hidden_size=visit.hidden,
            intermediate_size=visit.intermediate,
            num_hidden_layers=1,
            vocab_size=16,
            num_attention_heads=visit.heads,
            num_key_value_heads=visit.heads,
        )
        base: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16)
        adapter = AdapterConfig(num_experts=experts, density=density, support_strategy="random", **form)
        names = [f"expert{e}" for e in range(experts)]
        base = base.to(visit.device)
        model = add_experts(base, adapter, expert_names=names, seed=0).train()
        block = model.layers[0]
        x = visit.random(visit.tokens, visit.hidden, gradient=True)
        with torch.no_grad():
            for parameter in block.deltas.parameters():
                parameter.normal_(std=0.02)

        def frozen(block: Any = block, x: Tensor = x) -> None:
            block.block(x).sum().backward()

        def routed(block: Any = block, x: Tensor = x) -> None:
            block(x).sum().backward()

        if name == "neuron":
            visit.note("feed-forward, frozen", seconds=visit.seconds(frozen))
        visit.note(f"feed-forward, SRDE {name}", seconds=visit.seconds(routed), peak_gib=visit.peak_gib(routed))
        few = x[:64].detach()
        with torch.no_grad():
            exact = copy.deepcopy(block).double()(few.double())
            errors = (block(few).double() - exact).norm(dim=1) / exact.norm(dim=1)
        # The median: a token whose choice of experts is a near tie may go elsewhere.
        visit.note(f"feed-forward, SRDE {name}, against float64", relative_error=float(errors.median()))
        if adapter.granularity == "neuron":
            block.dispatch = LocalDispatch(compiled=True)
            visit.note(f"feed-forward, SRDE {name}, compiled", seconds=visit.seconds(routed))
            if visit.device.type == "cuda":
                block.dispatch = LocalDispatch(kernels=True)
                with torch.no_grad():
                    errors = (block(few).double() - exact).norm(dim=1) / exact.norm(dim=1)
                visit.note(f"feed-forward, SRDE {name}, Triton's kernels", seconds=visit.seconds(routed))
                visit.note(f"Triton's kernels against float64, {name}", relative_error=float(errors.median()))


def _loss(visit: Visit) -> None:
    count = visit.tokens
    weight, x = visit.random(visit.vocabulary, visit.hidden), visit.random(count, visit.hidden, gradient=True)
    tokens = torch.randint(0, visit.vocabulary, (count,), device=visit.device)

    def without_logits() -> None:
        linear_cross_entropy(x, weight, None, tokens).backward()

    def of_logits() -> None:
        F.cross_entropy(F.linear(x, weight).float(), tokens, reduction="sum").backward()

    for what, work in (("without logits", without_logits), ("of logits", of_logits)):
        visit.note(f"loss {what}", seconds=visit.seconds(work), peak_gib=visit.peak_gib(work))


def random_base(
    visit: Visit, *, layers: int | None = None, attn_implementation: str = DOCUMENT_ATTENTION
) -> PreTrainedModel:
    """The base of the options with random weights, made on the device; `layers`: only so many."""
    config: Any = AutoConfig.from_pretrained(visit.options.base, trust_remote_code=False)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers, text.layer_types = layers, None
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=torch.bfloat16, attn_implementation=attn_implementation
        )
    base = base.to_empty(device=visit.device).requires_grad_(False)
    _fill(base.parameters())
    for module in base.modules():  # the rotation's frequencies are computed from the configuration
        if hasattr(module, "inv_freq"):
            with visit.device:
                frequencies = dict(type(module)(module.config).named_buffers())
            vars(module)["_buffers"].update(frequencies)
    return base.eval()


def _fill(parameters: Iterator[Any]) -> None:
    for parameter in parameters:
        parameter.data.fill_(1) if parameter.dim() == 1 else parameter.data.normal_(std=0.02)


def model(visit: Visit) -> None:
    """The whole model, forward and backward with checkpointing: frozen, LoRA r=64, SRDE, and its switches."""
    base, options = random_base(visit), visit.options
    lora = replace(options, density=options.density * 165 / 606)  # rank 64 in the 14 B shape
    for method, chosen in (("frozen base", options), ("PEFT LoRA, feed-forward", lora), (DEFAULT, options)):
        case = plain_case(chosen, base, options.base, method, True)
        _note_case(visit, case)
        if method == DEFAULT:
            _waits(visit, case)
            _profile(visit, case)
    for switch in (_with_logits, _dense_mask, _compiled, _with_kernels):
        with switch(visit) as chosen:
            case = plain_case(chosen, base, options.base, DEFAULT, True)
            _note_case(visit, case, what=(switch.__doc__ or "").strip("."))
    for method in ("SRDE neuron", "SRDE random blocks", "SRDE single weights"):
        _note_case(visit, plain_case(options, base, options.base, method, True))
    to_float8(base, base.get_output_embeddings())
    for method in ("frozen base", DEFAULT):
        with patch.object(attach, "identity_before_quantization", lambda *_, **__: {}):  # random weights have no files
            case = plain_case(options, base, options.base, method, True)
        _note_case(visit, case, what=f"{method}, {IN_FP8}")


def _note_case(visit: Visit, case: Case, what: str = "") -> None:
    peak = visit.peak_gib(case.step)
    host: list[float] = []

    def launch() -> None:
        started = time.perf_counter()
        case.step()
        host.append(time.perf_counter() - started)

    seconds = statistics.median(timed(launch) for _ in range(visit.repeats))
    visit.note(
        what or case.name,
        seconds=seconds,
        host_seconds=statistics.median(host),
        tokens_per_second=visit.tokens / seconds,
        peak_gib=peak,
        trained_values=case.trained,
        tflops=case.flops / seconds / 1e12,
    )


@contextmanager
def _with_logits(visit: Visit) -> Iterator[Options]:
    """SRDE, loss of all logits."""
    from srde_ds.model import adapter

    with patch.object(adapter, "has_plain_head", lambda base: False):
        yield visit.options


@contextmanager
def _dense_mask(visit: Visit) -> Iterator[Options]:
    """SRDE, attention with a dense mask."""

    def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        documents: Documents = options["documents"]
        number = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
        number = number.view(query.shape[0], -1).to(query.device)
        seen = (number[:, None, :, None] == number[:, None, None, :]).tril()
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=options.get("scaling"), enable_gqa=True
        )
        return found.transpose(1, 2), None

    AttentionInterface.register(DOCUMENT_ATTENTION, masked)
    try:
        yield visit.options
    finally:
        AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)


@contextmanager
def _compiled(visit: Visit) -> Iterator[Options]:
    """SRDE, experts' arithmetic compiled."""
    from srde_ds.model import layer as layer_module

    with patch.object(layer_module, "LocalDispatch", lambda: LocalDispatch(compiled=True)):
        yield visit.options


@contextmanager
def _with_kernels(visit: Visit) -> Iterator[Options]:
    """SRDE, Triton's kernels."""
    from srde_ds.model import layer as layer_module

    with patch.object(layer_module, "LocalDispatch", lambda: LocalDispatch(kernels=True)):
        yield visit.options


def _waits(visit: Visit, case: Case) -> None:
    """How often the program waits for the GPU in a micro-step."""
    if visit.device.type != "cuda":
        visit.note("waits in a micro-step", waits=None)
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            case.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in found if "synchroniz" in str(w.message)]
    where = [f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]
    visit.note("waits in a micro-step", waits=len(waits), where=where[:20])


def _profile(visit: Visit, case: Case) -> None:
    from torch.profiler import ProfilerActivity, profile

    on_gpu = visit.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        timed(case.step)
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, column))
    top = [[event.key[:80], event.count, getattr(event, column) / 1e6] for event in events[:20]]
    visit.note("profile of a micro-step", kernels=sum(event.count for event in events), top_seconds=top)


def engine(visit: Visit) -> None:
    """A step through ZeRO-3 on one process, update included: seconds, peak of all memory, the copies of a save."""
    from srde_ds.distributed import engine as engine_module  # the other parts need no deepspeed
    from srde_ds.distributed.zero_placement import state_slices

    options = visit.options

    kept: list[Any] = []
    build = engine_module.build_engine

    def building(*arguments: Any) -> Any:
        kept.append(build(*arguments))
        return kept[-1]

    with (
        patch.object(engine_module, "load_frozen_base", lambda *_: random_base(visit)),
        patch.object(engine_module, "build_engine", building),
    ):
        case = engine_case(options, options.base, DEFAULT, True, updates=True)
    with patch.object(F, "linear", case.linear):
        for _ in range(2):
            case.step()
        _note_case(visit, case, "step with update, engine")
    state = state_slices(kept[0].deepspeed, kept[0].model, kept[0].optimizer)
    pinned = visit.device.type == "cuda"
    copies = [torch.empty(part.data.shape, dtype=part.data.dtype, pin_memory=pinned) for part in state]

    def copy_out() -> None:
        for part, there in zip(state, copies, strict=True):
            there.copy_(part.data, non_blocking=True)

    size = sum(there.numel() * there.element_size() for there in copies)
    visit.note("copies of a save, for which training stands still", seconds=visit.seconds(copy_out), bytes=size)
    stop_processes()


def decode(visit: Visit) -> None:
    """A token after a prompt of 128, by four layers: the base and neuron experts, eagerly and under a CUDA graph."""
    base = random_base(visit, layers=2 if visit.rehearse else 4, attn_implementation="sdpa")
    adapter = AdapterConfig(num_experts=6, density=visit.options.density, neuron_parts=4, support_strategy="random")
    with patch.object(attach, "identity_before_quantization", lambda *_, **__: {}):  # it would copy weights to the host
        model = add_experts(base, adapter, expert_names=[f"expert{e}" for e in range(6)], seed=0).eval()
    # On a CPU there are no such graphs; the rehearsal shows that nothing breaks the one that torch.compile makes.
    how: dict[str, Any] = {"backend": "aot_eager"} if visit.rehearse else {"mode": "reduce-overhead"}
    token = torch.zeros(1, 1, dtype=torch.long, device=visit.device)
    count = 2 if visit.rehearse else 20
    seconds: dict[tuple[str, str], float] = {}
    with torch.no_grad(), ExitStack() as held:
        for block in model.layers:
            _fill(block.deltas.parameters())
            held.enter_context(block.hold_prepared(torch.bfloat16))
        for name in ("SRDE", "base"):
            compiled = torch.compile(model.base, fullgraph=True, **how)
            counters.clear()
            for way, forward in (("CUDA graph", compiled), ("eagerly", model.base)):
                cache = StaticCache(config=model.base.config, max_cache_len=1024)
                options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}

                def tokens(forward: Any = forward, options: dict[str, Any] = options) -> None:
                    for _ in range(count):
                        forward(token, **options)

                with model.no_experts() if name == "base" else nullcontext():
                    model.base(token.repeat(1, 128), **options)
                    first = timed(tokens)
                    seconds[name, way] = visit.seconds(tokens) / count
                skips = {"cudagraph_skips": counters["inductor"]["cudagraph_skips"]}  # then it is no such graph
                graphs = skips | {"graphs": counters["stats"]["unique_graphs"], "seconds_of_compiling": round(first, 1)}
                visit.note(f"token, {name}, {way}", seconds=seconds[name, way], **graphs if forward is compiled else {})
    for way in ("CUDA graph", "eagerly"):
        added = (seconds["SRDE", way] - seconds["base", way]) / len(model.layers)
        visit.note(f"token, what the experts add to a layer, {way}", seconds=added)


PARTS: dict[str, Callable[[Visit], None]] = {
    "machine": machine,
    "layer": layer,
    "model": model,
    "engine": engine,
    "decode": decode,
    "tests": tests,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output_file", type=Path, default=Path("gpu_visit.jsonl"))
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        raise SystemExit("There is no GPU. See whether all parts run: --rehearse.")
    with tempfile.TemporaryDirectory() as scratch:
        visit = Visit(rehearse=given.rehearse, output=given.output_file, scratch=Path(scratch))
        visit.part = given.part
        started = time.monotonic()
        PARTS[given.part](visit)
        visit.note("done", seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
