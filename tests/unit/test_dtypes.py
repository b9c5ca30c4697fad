"""What is said of dtypes that a machine is slow at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.utils.dtypes import warn_of_slow_bfloat16
from tests.evaluation_helpers import save_model


@pytest.mark.parametrize(
    ("processor", "gpu", "bf16", "told"),
    [
        ("AVX2", False, True, True),
        ("AVX2", False, False, False),
        ("AVX2", True, True, False),
        ("AVX512", False, True, False),
        ("DEFAULT", False, True, False),  # such as ARM, whose bfloat16 may be fast
    ],
)
def test_slow_bfloat16_is_told(
    processor: str,
    gpu: bool,
    bf16: bool,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    warn_of_slow_bfloat16(bf16)
    assert ("--bf16 false is several times as fast" in caplog.text) == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is fast at it")
def test_trained_experts_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = str(save_model(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    load_model(ModelOptions(weights, bf16=False))
    assert "bf16=true" not in caplog.text
    load_model(ModelOptions(weights))
    assert "bf16=true: this CPU" in caplog.text
