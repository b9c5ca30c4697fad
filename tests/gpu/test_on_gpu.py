"""What only a GPU can show; the rest of the tests run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

from srde_ds.model.dispatch import LocalDispatch
from srde_ds.model.float8 import OLDEST_GPU, Float8Linear
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.reference import muon_step
from srde_ds.peft.statistics import measure_domains
from tests.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens
from tests.peft_helpers import tiny_peft

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


@pytest.mark.parametrize("granularity", ["neuron", "block", "element"])
def test_zero_deltas_give_the_bases_logits_in_bf16(granularity: str) -> None:
    base: Any = tiny_llama(dtype=torch.bfloat16)
    base.cuda()
    ids = tokens().cuda()
    expected = base(ids).logits
    model = tiny_srde(dtype=torch.bfloat16, base=base, granularity=granularity).cuda()
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("granularity", ["neuron", "block", "element"])
def test_gpu_and_cpu_give_the_same_logits(granularity: str) -> None:
    model = randomize(tiny_srde(dtype=torch.float64, granularity=granularity))
    expected = model(tokens()).logits
    torch.testing.assert_close(model.cuda()(tokens().cuda()).logits.cpu(), expected, rtol=1e-9, atol=1e-9)


def test_domains_are_measured_one_after_the_other() -> None:
    """The first domain's statistics are on the GPU with the model when the second's come from host memory."""
    model = tiny_peft(num_experts=2, top_k=1, expert_names=["math", "code"]).cuda()
    for domain in ("math", "code"):
        rows = {"input_ids": [row.tolist() for row in tokens(vocabulary=60)], "domain": [domain] * 2}
        measure_domains(model, datasets.Dataset.from_dict(rows), tiny_tokenizer())
    own = model.srde_model().origins
    assert list(own.domain_tokens) == ["math", "code"]
    assert all(statistics.mean.is_cuda and len(statistics.mean) == 2 for statistics in own.statistics)


@pytest.mark.parametrize("scope", ["shared", "per_expert"])
def test_the_experts_kernels_equal_the_readable_path(scope: str) -> None:
    """Output and gradients of a training step, with Triton's kernels and without."""
    model = randomize(tiny_srde(support_scope=scope)).cuda()
    ids, results = tokens().cuda(), []
    for kernels in (True, False):
        model.zero_grad()
        for layer in model.layers:
            layer.dispatch = LocalDispatch(kernels=kernels)
        loss = model(ids, labels=ids).loss_sum
        assert loss is not None
        loss.backward()
        gradients = {name: gradient_of(p).clone() for name, p in model.trainable_parameters()}
        results.append({"loss": loss.detach()} | gradients)
    for name, expected in results[1].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(results[0][name], expected, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_gpu_and_cpu_draw_the_same_mask_of_a_learned_support(granularity: str) -> None:
    form: dict[str, Any] = {
        "support_strategy": "learned",
        "support_scope": "per_expert",
        "density": 0.2,
        "target_density": 0.05,
    }
    model = randomize(tiny_srde(dtype=torch.float64, granularity=granularity, **form))
    bank = model.layers[0].deltas
    expected = bank(temperature=1.0, step=3)
    torch.testing.assert_close(bank.cuda()(temperature=1.0, step=3).cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_GPU, reason="products in FP8 need Hopper"
)
def test_products_in_fp8_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    module = Float8Linear.of(nn.Linear(64, 48).bfloat16())
    x, of_y = torch.randn(5, 64).bfloat16().requires_grad_(), torch.randn(5, 48).bfloat16()
    expected = module(x)
    [of_x] = torch.autograd.grad(expected, x, of_y)
    there = x.detach().cuda().requires_grad_()
    found = module.cuda()(there)
    torch.testing.assert_close(found.cpu(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.autograd.grad(found, there, of_y.cuda())[0].cpu(), of_x, rtol=0.02, atol=0.02)


def test_gram_muon_is_exact_although_tf32_is_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(128, 2, 8, generator=generator)
    parameter = torch.zeros(128, 2, 8, device="cuda", requires_grad=True)
    parameter.grad = gradient.cuda()
    optimizer = GramMuonAdamW([{"params": [parameter], "rule": "muon", "lr": 0.1, "step": 1}])
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        optimizer.step()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    zero = torch.zeros(128, 2, 8)
    expected, _ = muon_step(zero, gradient, zero, lr=0.1, momentum=0.95, weight_decay=0.0)
    torch.testing.assert_close(parameter.detach().cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phases", [{}, {"supervised_experts": "true", "expert_pretrain_steps": 1, "eval_steps": 2}])
def test_training_runs_to_its_end(tmp_path: Path, phases: dict[str, Any]) -> None:
    """One process on one GPU in bf16, from JSONL to weights; also with each row's expert given."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    domains = ["red", "green"]
    data = write_jsonl(tmp_path / "train.jsonl", [record for d in domains for record in sums(d, range(24))])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [record for d in domains for record in sums(d, range(24, 32))])
    flags: dict[str, Any] = {
        "model_name": tmp_path / "base",
        "jsonl_data": data,
        "eval_file": held_out,
        "domains": ",".join(domains),
        "num_experts": 2,
        "density": 0.05,
        "max_length": 96,
        "max_steps": 4,
        "warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "output_dir": tmp_path / "run",
    } | phases
    command = [
        sys.executable,
        "launch/train.py",
        *(part for key, value in flags.items() for part in (f"--{key}", str(value))),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/completed.json").exists()
