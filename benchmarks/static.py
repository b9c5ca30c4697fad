"""What can be known of a training step without a GPU: kernels, host waits, graph breaks, memory, bytes moved.

    python -m benchmarks.static      # about two minutes; a table, and benchmarks/results/static.json

* Kernels and waits of one decoder layer, forwards and backwards, by counting torch's operators; views and allocations
  are none, and a launch of a Triton kernel is one. Neuron experts are counted without computing, with a GPU's
  attention; blocks and single weights on the CPU, because their shapes depend on values. A wait is an operator whose
  result the program must have before it can go on.
* Graph breaks of the experts' block under torch.compile, and of decoding with a static cache.
* Memory of a micro-step of the 14 B shape without computing (2 x 4,096 tokens, bf16, checkpointing): the most that is
  alive above weights, masters and gradients, against the plan's figure.
* Bytes of all collectives in a step of a tiny run on two processes, against the plan's figure.

tests/unit/test_static.py measures the cheap ones anew and fails if one has become worse.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.tables import measured_on
from srde_ds.config import AdapterConfig, Config, resolve
from srde_ds.distributed.workload import Workload
from srde_ds.model import attach, dispatch, feed_forward, fused
from srde_ds.model import layer as layer_module
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents, _by_kernel, document_attention
from srde_ds.model.base_shape import base_shape
from srde_ds.model.delta_linear import DenseDeltas
from srde_ds.model.feed_forward import block_shapes
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.recompute import recompute_selectively
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.model.supports.selection import support_shape
from srde_ds.model.targets import Targets
from srde_ds.planner.memory import memory
from srde_ds.utils.units import GIB

RECORD = Path(__file__).resolve().parent / "results/static.json"
WAITS = ("_local_scalar_dense", "nonzero", "bincount", "equal", "is_nonzero", "_unique2", "masked_select")
NO_KERNELS: tuple[str, ...] = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
)
NO_KERNELS += ("alias", "_unsafe_view", "squeeze_", "device", "promote_types", *WAITS[:1])  # nothing runs on the GPU
FORMS: dict[str, dict[str, Any]] = {
    "quarters of neurons": {"neuron_parts": 4},
    "neuron, shared support": {},
    "neuron, a support each": {"support_scope": "per_expert"},
    "blocks": {"granularity": "block"},
    "single weights": {"granularity": "element"},
}
DEPEND_ON_VALUES = ("block", "element")
"""granularities whose shapes follow from values: which tokens an expert has, and where its weights are"""
WITH_KERNELS = {f"{form}, with --expert_kernels": form for form in ("quarters of neurons", "neuron, shared support")}
RUN: dict[str, Any] = {
    "model_name": str(Path(__file__).resolve().parent / "ministral_3_14b"),
    "max_length": 4096,
    "batch_size": 2,
}


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, and the bytes of the tensors that they make while these live.

    Attributes:
        kernels, waits: how often each operator ran.
        peak: the most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note it."""
        name = function.overloadpacket.__name__
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        if name in WAITS:
            self.waits[name] += 1
        made = [alias.alias_info for alias in function._schema.returns]
        is_view = any(info is not None and not info.is_write for info in made)
        if not is_view and name not in NO_KERNELS:
            self.kernels[name] += 1
        for storage in _storages(result):
            if storage._cdata not in given:
                self._note(storage)
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class CountedLaunch:
    """Takes the place of a Triton kernel: each launch is counted as a kernel, and computes nothing."""

    def __init__(self, name: str, kernels: Counter[str]) -> None:
        self.name, self.kernels = name, kernels

    def __getitem__(self, grid: tuple[int, ...]) -> CountedLaunch:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        """Count a launch."""
        self.kernels[self.name] += 1


@contextmanager
def launches_in(kernels: Counter[str]) -> Iterator[None]:
    """Count the launches of the experts' Triton kernels, as if the CPU were a GPU. Triton is not needed."""
    names = ("experts_forward", "experts_backward")
    counted = SimpleNamespace(**{name: CountedLaunch(name, kernels) for name in names})
    with (
        patch.dict(sys.modules, {"srde_ds.model.expert_kernels": counted}),
        patch.multiple(fused, HAS_TRITON=True, KERNEL_DEVICES={"cpu"}),
    ):
        yield


def _storages(values: Any) -> list[Any]:
    """Of the tensors among the values; sparse ones consist of others."""
    dense = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.layout == torch.strided]
    return [tensor.untyped_storage() for tensor in dense]


def small_llama(layers: int, *, expert_kernels: bool = False, **adapter: Any) -> SRDEModel:
    """A Llama of D 64 with three experts, in training."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = DOCUMENT_ATTENTION
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config)
    base = base.to(torch.bfloat16).requires_grad_(False)
    options = AdapterConfig(**{"num_experts": 3, "top_k": 2, "density": 0.05} | adapter)
    model = add_experts(base, options, expert_names=["a", "b", "c"], seed=0)
    for layer in model.layers:
        layer.dispatch = dispatch.LocalDispatch(kernels=expert_kernels)
    return model.train()


def without_values(model: SRDEModel) -> FakeTensorMode:
    """Take the model's values away; inside the mode nothing is computed."""
    mode, moved = FakeTensorMode(), {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in moved:
                        moved[id(tensor)] = as_fake(tensor, mode)
                    tensors[name] = moved[id(tensor)]
    return mode


def as_fake(tensor: Tensor, mode: FakeTensorMode) -> Any:
    """A tensor of its shape and attributes."""
    with mode:
        found: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        found = torch.nn.Parameter(found, requires_grad=tensor.requires_grad)
    vars(found).update({key: value for key, value in vars(tensor).items() if key.startswith("srde_")})
    return found


def micro_step(model: SRDEModel, rows: int, length: int, mode: FakeTensorMode | None = None) -> Operators:
    """The operators of a forward and a backward of rows with one document each and a label everywhere.

    Args:
        mode: of a model without values, which then attends as on a GPU; None: on the CPU.
    """
    positions = torch.arange(length).repeat(rows, 1)
    documents, targets = Documents.of(positions), Targets.of(torch.zeros_like(positions))
    mask, everything = torch.ones(rows, length, dtype=torch.bool), torch.ones(len(model.expert_names))
    for _, parameter in model.trainable_parameters():  # DeepSpeed reduces a gradient when it is there, and drops it
        parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def there(tensor: Tensor) -> Tensor:
        if mode is None:
            return tensor
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    inputs: dict[str, Any] = {
        "input_ids": there(torch.zeros_like(positions)),
        "position_ids": there(positions),
        "token_mask": there(mask),
        "attention_mask": there(documents.no_mask),
        "documents": Documents(documents.lengths, there(documents.borders), there(documents.no_mask)),
        "labels": Targets(there(targets.columns), there(targets.tokens), there(targets.count)),
    }
    policy = RoutingPolicy(
        loss_scale=there(torch.ones(())),
        auxiliary_weights=AuxiliaryWeights(load_balancing=0.01, router_z=0.001),
        expert_share=there(everything.repeat(len(model.layers), 1)),
        statistics=RoutingStatistics(len(model.layers), len(everything)),
    )
    attention = document_attention if mode is None else attention_of_a_gpu
    AttentionInterface.register(DOCUMENT_ATTENTION, attention)
    with mode or nullcontext(), Operators() as found, launches_in(found.kernels):
        model(**inputs, policy=policy).loss_sum.backward()
    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    return found


def attention_of_a_gpu(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, documents: Documents, **options: Any
) -> tuple[Tensor, None]:
    """As `document_attention` where there is a kernel for documents."""
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    output = _by_kernel(flat[0], flat[1], flat[2], documents, options.get("scaling"))
    return output.view(query.shape[0], query.shape[2], query.shape[1], -1), None


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def of_a_layer(form: dict[str, Any] | None) -> dict[str, int]:
    """Kernels and waits that a layer more costs in a micro-step; None: of the base alone."""
    found = []
    for layers in (2, 3):
        model = small_llama(layers, **form or {})
        mode = None if form and form.get("granularity") in DEPEND_ON_VALUES else without_values(model)
        if form is None:
            model.base.enable_input_require_grads()
        with model.no_experts() if form is None else nullcontext():
            if mode is None:
                micro_step(model, 2, 16)  # what is made once is no kernel of a step
            operators = micro_step(model, 2, 16, mode)
        found.append((operators.kernels.total(), operators.waits.total()))
    (kernels, waits), (more_kernels, more_waits) = found
    return {"kernels": more_kernels - kernels, "waits": more_waits - waits}


def graph_breaks(form: dict[str, Any]) -> dict[str, int]:
    """Graphs and breaks of the experts' block in training under torch.compile, with losses and statistics."""
    model = small_llama(1, **form)
    policy = RoutingPolicy(
        auxiliary_weights=AuxiliaryWeights(load_balancing=0.01, router_z=0.001),
        expert_share=torch.ones(1, 3),
        statistics=RoutingStatistics(1, 3),
    )
    torch._dynamo.reset()
    with model.routing.running(policy):
        found = torch._dynamo.explain(model.layers[0])(torch.randn(1, 16, 64, dtype=torch.bfloat16, requires_grad=True))
    torch._dynamo.reset()
    return {"graphs": found.graph_count, "graph_breaks": found.graph_break_count}


def decoding(form: dict[str, Any]) -> dict[str, int]:
    """Of a token that is decoded with a static cache and prepared experts, as on a GPU in bfloat16.

    Returns:
        The kernels that experts add to a layer, all waits, and the graph breaks of the whole model. A CUDA graph needs
        zeros in the last two.
    """
    kernels, waits, breaks = [], [], []
    token = torch.zeros(1, 1, dtype=torch.long)
    for layers in (2, 3):
        model = small_llama(layers, **form).eval()
        model.base.set_attn_implementation("sdpa")
        cache = {"past_key_values": StaticCache(config=model.base.config, max_cache_len=16), "use_cache": True}
        with torch.no_grad(), ExitStack() as held, patch.object(layer_module, "arithmetic_dtype", lambda t: t.dtype):
            for layer in model.layers:
                layer.deltas.free.fill_(0.01)
                held.enter_context(layer.hold_prepared(torch.bfloat16))
            model.base(token.repeat(1, 4), **cache)
            breaks.append(torch._dynamo.explain(model.base)(token, **cache).graph_break_count)
            with Operators() as found:
                model.base(token, **cache)
            with model.no_experts(), Operators() as bare:
                model.base(token, **cache)
        kernels.append(found.kernels.total() - bare.kernels.total())
        waits.append(found.waits.total())
    torch._dynamo.reset()
    return {"added_kernels": kernels[1] - kernels[0], "waits": max(waits), "graph_breaks": max(breaks)}


def large_model(config: Config, layers: int) -> SRDEModel:
    """The 14 B shape without storage, with its experts and so many layers; on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    whole: Any = AutoConfig.from_pretrained(str(config.model.model_name), trust_remote_code=False)
    text = whole.get_text_config()
    text.num_hidden_layers, text.layer_types = layers, None
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            whole, trust_remote_code=False, dtype=torch.bfloat16, attn_implementation=DOCUMENT_ATTENTION
        )
        base.requires_grad_(False)
    blocks = block_shapes(base)
    supports = [torch.arange(math.prod(support_shape(config.adapter, *block)), dtype=torch.int32) for block in blocks]
    names = [f"expert{e}" for e in range(config.adapter.num_experts)]
    roles = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn"}
    with (  # both would read weights
        patch.object(feed_forward, "verify_block", lambda *_, **__: roles),
        patch.object(attach, "identity_before_quantization", lambda *_, **__: {}),
    ):
        return add_experts(base, config.adapter, expert_names=names, seed=0, supports=supports).train()


def micro_step_memory(layers: int, recompute: str = "full") -> dict[str, float]:
    """GiB of a micro-step above what lives all the time: counted, and planned for the same number of layers.

    As on one process, which holds the whole base.
    """
    config = resolve({}, RUN | {"recompute": recompute})
    model = large_model(config, layers)
    if recompute == "full":
        model.enable_gradient_checkpointing(use_reentrant=True)
    elif recompute == "selective":
        recompute_selectively(model.base, model.routing)
    found = micro_step(model, config.training.batch_size, config.data.max_length, without_values(model))
    return {"counted_gib": found.peak / GIB, "planned_gib": planned_memory(layers, recompute)}


def planned_memory(layers: int, recompute: str = "full") -> float:
    """GiB that the plan gives a micro-step above weights, masters and gradients."""
    config = resolve({}, RUN | {"recompute": recompute})
    whole = base_shape(config)
    moments = memory(Workload.of(config, 1), replace(whole, layers=whole.layers[:layers])).moments
    return max(sum(parts.values()) for name, parts in moments.items() if name != "optimizer step") / GIB


def collectives() -> dict[str, dict[str, float]]:
    """Bytes that a process receives in a step of a tiny run on two, by checkpointing: counted, and planned."""
    from srde_ds.planner.traffic import step_traffic
    from tests.distributed.harness import run_distributed
    from tests.distributed.test_step_traffic import counted, two_steps
    from tests.distributed.training_helpers import make_inputs

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder))
        for checkpointing in (False, True):
            output = str(Path(folder) / f"run-{checkpointing}")
            flags = two_steps(inputs, Path(folder), {}, gradient_checkpointing=checkpointing) | {"output_dir": output}
            received = run_distributed(counted, 2, flags, timeout=300)[0]
            config = resolve({}, flags)
            planned = sum(traffic.received for traffic in step_traffic(Workload.of(config, 2), base_shape(config)))
            name = "checkpointing" if checkpointing else "plain"
            found[name] = {"counted": sum(received.values()), "planned": planned}
    return found


def cheap() -> dict[str, Any]:
    """What a test can afford to measure anew."""
    with patch.object(dispatch, "element_deltas", DenseDeltas):  # as on a GPU
        forms = FORMS | {name: FORMS[form] | {"expert_kernels": True} for name, form in WITH_KERNELS.items()}
        layers = {"frozen base": of_a_layer(None)} | {name: of_a_layer(form) for name, form in forms.items()}
        breaks = {name: graph_breaks(form) for name, form in FORMS.items()}
    neurons = {name: decoding(form) for name, form in FORMS.items() if "neuron" in name}
    return {
        "layer": layers,
        "compiled_block": breaks,
        "decoding": neurons,
        "memory_two_layers": micro_step_memory(2)["counted_gib"],
    }


def worse(found: Any, recorded: Any, path: str = "") -> list[str]:
    """Which of the figures, in all of which less is better, are larger than the recorded ones; by more than 1 %."""
    if isinstance(found, dict):
        return [line for key in found for line in worse(found[key], recorded.get(key), f"{path}.{key}".lstrip("."))]
    if recorded is None:
        return [f"{path}: not recorded"]
    return [f"{path}: {found:g}, recorded {recorded:g}"] if found > recorded * 1.01 else []


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    record = cheap() | {
        "memory_14b": micro_step_memory(40),
        "memory_14b_selective": micro_step_memory(40, "selective"),
        "collective_bytes": collectives(),
    }
    print(json.dumps(record, indent=1))
    RECORD.write_text(json.dumps(record | {"environment": measured_on()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
