"""SRDE's experiments for PEFT's comparison of methods: a tiny model is trained with them as its harness does."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import get_cosine_schedule_with_warmup

from srde_ds.peft import SRDEConfig
from tests.helpers import tiny_llama, tokens
from tests.peft_helpers import logits

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peft_method_comparison"
EXPERIMENTS = sorted((FOLDER / "experiments" / "srde").iterdir())


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_trains_a_tiny_model(experiment: Path, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(str(experiment))
    assert (
        isinstance(config, SRDEConfig) and f"density{config.density:g}" in experiment.name and config.metadata is None
    )
    parameters = json.loads((experiment / "training_params.json").read_text())
    assert parameters.keys() <= {"optimizer_kwargs"} and parameters["optimizer_kwargs"].keys() == {"lr", "weight_decay"}
    config.density = 0.05  # of 96 neurons
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=True)
    with model.disable_adapter():
        bare = logits(model, tokens())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **parameters["optimizer_kwargs"])
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=6)
    batch = {"input_ids": tokens(4), "attention_mask": torch.ones(4, 16, dtype=torch.long), "labels": tokens(4)}
    batch["attention_mask"][2:, 11:], batch["labels"][2:, 12:] = 0, -100
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=int(batch["attention_mask"].sum())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    with torch.inference_mode():
        assert model.generate(input_ids=tokens(), max_new_tokens=3, pad_token_id=0).shape == (2, 19)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), bare)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / SAFETENSORS_WEIGHTS_NAME).stat().st_size > 0


def test_the_starter_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, name = tmp_path / "method_comparison" / "MetaMathQA", EXPERIMENTS[0].name
    harness.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="usage: python run.py"):
        runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
    main = runpy.run_path(str(FOLDER / "run.py"))["main"]
    with pytest.raises(SystemExit, match="Give a checkout of PEFT"):
        main(str(tmp_path), "x")
    (harness / "run.py").touch()
    with pytest.raises(SystemExit, match="experiment 'x': choose one of llama"):
        main(str(tmp_path), "x")
    monkeypatch.setitem(main.__globals__, "PYTHON", (4, 0))
    with pytest.raises(SystemExit, match=r"PEFT's harness needs 4\.0 or newer"):
        main(str(tmp_path), name)
    monkeypatch.setitem(main.__globals__, "PYTHON", (3, 0))
    with pytest.raises(SystemExit, match=f"Install the checkout: pip install -e {tmp_path}"):
        main(str(tmp_path), name)
    assert list(harness.iterdir()) == [harness / "run.py"]


def test_the_starter_runs_the_harness_with_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, name = tmp_path / "method_comparison" / "MetaMathQA", EXPERIMENTS[0].name
    harness.mkdir(parents=True)
    (harness / "harness_utils.py").write_text("from peft import PeftConfig as Config\n")
    program = (
        "import sys, harness_utils\nconfig = harness_utils.Config.from_pretrained(sys.argv[-1])\n"
        "open('seen', 'w').write(f'{config.peft_type.value} {sys.argv}')\n"
    )
    (harness / "run.py").write_text(program)
    main = runpy.run_path(str(FOLDER / "run.py"))["main"]
    monkeypatch.setitem(main.__globals__, "PYTHON", (3, 0))
    monkeypatch.setattr("peft.__file__", str(tmp_path / "src" / "peft" / "__init__.py"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    main(str(tmp_path), name, "-v")
    assert (harness / "seen").read_text() == f"SRDE ['run.py', '-v', 'experiments/srde/{name}']"
