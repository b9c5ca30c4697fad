"""TRL's trainers train the experts, and the batches that they make give right results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from srde_ds.compose.summary import inspect_weights
from srde_ds.errors import SRDEError
from srde_ds.optim import for_trainer
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.peft import SRDEConfig
from srde_ds.peft.callback import SRDECallback
from srde_ds.peft.rows import by_domain, conversations_of
from srde_ds.peft.warm_start import padded_rows, warm_start_routers
from tests.data_helpers import tiny_tokenizer
from tests.helpers import tiny_llama
from tests.peft_helpers import NAMES, peft_config, tiny_peft

pytest.importorskip("trl", reason="trl is not installed: pip install srde-ds[trl]")

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

WORDS = tiny_tokenizer()
WORDS.pad_token = "<s>"


def base() -> PreTrainedModel:
    return tiny_llama(vocab_size=len(WORDS), max_position_embeddings=256)


def new_model(*, random: bool = False) -> Any:
    return tiny_peft(base(), random=random).train()


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return values | more


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


SFT = datasets.Dataset.from_list(
    [
        {"prompt": said("user", f"{name} {n}?"), "completion": said("assistant", "ab" * (d + n)), "domain": name}
        for n in range(4)
        for d, name in enumerate(NAMES)
    ]
)
PREFERENCES = datasets.Dataset.from_list(
    [
        {"prompt": said("user", f"{n}?"), "chosen": said("assistant", "a" * n), "rejected": said("assistant", "bc")}
        for n in range(1, 9)
    ]
)
LABELLED = PREFERENCES.map(
    lambda row, n: {"completion": row["chosen"], "label": n % 2 == 0}, with_indices=True
).select_columns(["prompt", "completion", "label"])


def many_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(completion[0]["content"]))) for completion in completions]


TRAINERS: dict[str, Any] = {
    "SFT": (SFTTrainer, SFTConfig, {"max_length": 64}, SFT, {}),
    "DPO": (DPOTrainer, DPOConfig, {}, PREFERENCES, {}),
    "KTO": (KTOTrainer, KTOConfig, {}, LABELLED, {}),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        {"num_generations": 2, "max_completion_length": 8, "beta": 0.1},
        PREFERENCES.select_columns(["prompt"]),
        {"reward_funcs": [many_letters]},
    ),
}


def trainer_of(name: str, folder: Path, model: Any, *, muon: bool = True, **more: Any) -> Any:
    """With the callback."""
    trainer_class, config_class, options, rows, others = TRAINERS[name]
    trainer = trainer_class(
        model=model,
        args=config_class(**arguments(folder, **options | more)),
        train_dataset=rows,
        processing_class=WORDS,
        optimizers=(for_trainer(model) if muon else None, None),
        **others,
    )
    trainer.add_callback(SRDECallback(trainer))
    return trainer


def figures(trainer: Any) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_trl_trains_the_experts(name: str, tmp_path: Path) -> None:
    model = new_model()
    before = {name: p.detach().clone() for name, p in model.srde_model().trainable_parameters()}
    trainer = trainer_of(name, tmp_path, model)
    trainer.train()
    moved = [not torch.equal(p, before[name]) for name, p in model.srde_model().trainable_parameters()]
    assert len(moved) == 4 and all(moved)
    lines = figures(trainer)
    assert len(lines) == 2
    for line in lines:
        shares = [line[f"expert_share/{expert}"] for expert in NAMES]
        assert math.isclose(sum(shares), 1) and min(shares) > 0
        assert all(math.isfinite(line[key]) for key in ("load_balancing_loss", "router_z_loss", "router_entropy"))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    found = {name: p for name, p in again.srde_model().trainable_parameters()}
    assert all(torch.equal(p, found[name]) for name, p in model.srde_model().trainable_parameters())


def test_the_reference_of_a_trained_adapter_is_a_frozen_copy(tmp_path: Path) -> None:
    model = new_model(random=True)
    with torch.no_grad():
        model.eval()
        tokens = torch.arange(1, 17)[None]
        expected, bare = model(input_ids=tokens).logits, base()(input_ids=tokens).logits
    trainer = trainer_of("DPO", tmp_path, model.train(), max_steps=1, beta=0.0)
    assert list(model.peft_config) == ["default", "ref"] and model.active_adapters == ["default"]
    trainer.train()
    model.eval().set_adapter("ref")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected)
        assert not torch.allclose(bare, expected)
        model.set_adapter("default")
        assert not torch.equal(model(input_ids=tokens).logits, expected)
    assert figures(trainer)[0]["rewards/margins"] == 0  # before the first step both are the same


def test_a_trainer_may_make_the_experts_itself(tmp_path: Path) -> None:
    trainer_class, config_class, options, rows, _ = TRAINERS["SFT"]
    trainer = trainer_class(
        model=base(),
        args=config_class(**arguments(tmp_path, **options)),
        train_dataset=rows,
        processing_class=WORDS,
        peft_config=peft_config(),
    )
    trainer.add_callback(SRDECallback(trainer))
    trainer.train()
    assert "expert_share/expert0" in figures(trainer)[0]


# Batches


def gradients_and_statistics(model: Any, batches: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a step: the loss of all labels, and the router's losses by tokens."""
    model.zero_grad()
    steps = model.training_steps
    steps.expert_share = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    tokens = sum(batch["tokens"] for batch in batches)
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "tokens"}
        steps.micro_steps = tokens / batch["tokens"]  # so that each token counts alike
        labels = (inputs["labels"][:, 1:] != -100).sum()
        (model(**inputs).loss * labels).backward()
    steps.micro_steps = 1
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, steps.finish()


@pytest.mark.parametrize("form", ["padded", "padding_free", "packed"])
def test_batches_of_trl_are_the_sequences_one_by_one(form: str, tmp_path: Path) -> None:
    model = tiny_peft(base(), load_balancing_weight=0.5, router_z_weight=0.25).train()
    options: dict[str, Any] = {
        "padded": {},
        "padding_free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True},
    }
    more: dict[str, Any] = {"max_length": 128, "per_device_train_batch_size": 3} | options[form]
    trainer = trainer_of("SFT", tmp_path, model, **more)
    batch: dict[str, Any] = next(iter(trainer.get_train_dataloader()))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    starts = batch["position_ids"] == 0 if form != "padded" else (torch.arange(mask.shape[1]) == 0).expand_as(mask)
    ids, labels = batch["input_ids"][mask], batch["labels"][mask]
    places = [*starts[mask].nonzero().flatten().tolist(), len(ids)]
    lengths = [end - start for start, end in zip(places, places[1:], strict=False)]
    assert len(lengths) >= 3 and len(set(lengths)) > 1 and (form == "padded") == (not bool(mask.all()))
    single = [
        {"input_ids": i[None], "labels": own[None], "tokens": i.shape[0]}
        for i, own in zip(ids.split(lengths), labels.split(lengths), strict=True)
    ]
    expected, counts = gradients_and_statistics(model, single)
    found, sums = gradients_and_statistics(model, [batch | {"tokens": int(mask.sum())}])
    assert sums["tokens"].tolist() == counts["tokens"].tolist() == [len(ids)] * 2
    assert torch.equal(sums["assignments"], counts["assignments"])
    assert found.keys() == expected.keys() and len(found) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SFT", {"fp16": True, "bf16": False}, "fp16=True"),
        ("SFT", {"packing": True, "packing_strategy": "wrapped"}, "packing_strategy=wrapped"),
        ("SFT", {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8"),
    ],
)
def test_what_would_go_wrong_is_refused(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, new_model(), **options)
    with pytest.raises(SRDEError, match=message):
        trainer.train()


def test_copies_on_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path, new_model())
    trainer.args._n_gpu = 2
    with pytest.raises(SRDEError, match=r"n_gpu=2: .*torchrun"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


# The callback


def test_the_routers_start_by_domain_and_held_out_losses_are_by_domain(tmp_path: Path) -> None:
    model = new_model()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(tmp_path, max_length=64, eval_strategy="steps", eval_steps=1, learning_rate=0.0)),
        train_dataset=SFT,
        eval_dataset=by_domain(SFT),
        processing_class=WORDS,
    )
    rows = trainer.train_dataset
    trainer.add_callback(SRDECallback(trainer, warm_start=rows, domain_statistics=rows))
    untouched = new_model().srde_model().layers[0].router.weight
    trainer.train()
    routers = [layer.router.weight.detach().clone() for layer in model.srde_model().layers]
    assert not torch.allclose(routers[0], untouched)
    biases = [layer.router.selection_bias for layer in model.srde_model().layers]
    biases[0].fill_(0.5)
    shares = warm_start_routers(model, trainer.train_dataset, WORDS, seed=trainer.args.seed)
    assert not any(bias.any() for bias in biases)
    assert all(share > 0.4 for share in shares)
    # A learning rate of 0 leaves all as the warm start made it.
    assert all(
        torch.equal(layer.router.weight, own) for layer, own in zip(model.srde_model().layers, routers, strict=True)
    )
    held_out = [key for line in trainer.state.log_history for key in line if key.startswith("eval_expert")]
    assert {f"eval_{name}_loss" for name in NAMES} <= set(held_out)
    trainer.save_model(str(tmp_path / "adapter"))
    assert inspect_weights(tmp_path / "adapter").domain_tokens.keys() == set(NAMES)


def test_conversations_are_made_of_records(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    turns = [*said("user", "a"), *said("assistant", "b"), *said("user", "c"), *said("assistant", "d")]
    file.write_text(json.dumps({"messages": turns, "domain": "red"}))
    rows = conversations_of(file, ["red", "green"])
    assert rows[:] == {"prompt": [turns[:3]], "completion": [turns[3:]], "domain": ["red"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    file.write_text(json.dumps({"messages": turns, "domain": "red", "tools": tools}))
    with pytest.raises(SRDEError, match="it uses tools"):
        conversations_of(file, ["red"])
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    file.write_text(
        json.dumps({"messages": [turns[0], said("assistant", "")[0] | {"tool_calls": [call]}], "domain": "red"})
    )
    with pytest.raises(SRDEError, match="it uses tools"):
        conversations_of(file, ["red"])
    file.write_text(json.dumps({"messages": [*turns[:3], turns[3] | {"train": False}], "domain": "red"}))
    with pytest.raises(SRDEError, match="its last turn, the only one that TRL would learn, is not to be trained on"):
        conversations_of(file, ["red"])
    file.write_text(json.dumps({"messages": [turns[0], turns[1] | {"reasoning_content": "why"}], "domain": "red"}))
    with pytest.raises(SRDEError, match="'reasoning_content' in a message, which rows for TRL do not hold"):
        conversations_of(file, ["red"])


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        (None, [], [[5, 6, 7], [8, 9, -100]]),
        ("labels", [[-100, -100, 7], [-100, 9]], [[-100, -100, 7], [-100, 9, -100]]),
        ("completion_mask", [[0, 1, 1], [0, 1]], [[-100, 6, 7], [-100, 9, -100]]),
        ("assistant_masks", [[0, 0, 1], [1, 1]], [[-100, -100, 7], [8, 9, -100]]),
    ],
)
def test_the_routers_are_told_which_tokens_are_answers(
    column: str | None, values: list[list[int]], expected: list[list[int]]
) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "domain": ["red", "green"]})
    if column is not None:
        rows = rows.add_column(column, values)
    padded, domains = padded_rows(rows, ["red", "green", "blue"], "warm_start", most=9, seed=0)
    assert padded["labels"][:] == expected and domains == ["red", "green"]
    assert padded["length"][:] == [3, 2]


def test_of_many_rows_only_those_that_are_needed_are_held() -> None:
    domains = ["red"] * 40 + ["green"] * 2
    rows = datasets.Dataset.from_dict({"input_ids": [[number] for number in range(42)], "domain": domains})
    padded, _ = padded_rows(rows, ["red", "green"], "warm_start", most=3, seed=0)
    assert padded["domain"][:] == [0, 0, 0, 1, 1] and padded["input_ids"][3:] == [[40], [41]]
    others, _ = padded_rows(rows, ["red", "green"], "warm_start", most=3, seed=1)
    assert others["input_ids"][:] != padded["input_ids"][:]


def test_a_domain_without_an_expert_is_refused() -> None:
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6], "domain": "sports"}])
    with pytest.raises(SRDEError, match="domain 'sports': no expert has this name"):
        warm_start_routers(new_model(), rows, WORDS)
    with pytest.raises(SRDEError, match="no column 'domain'"):
        warm_start_routers(new_model(), rows.remove_columns("domain"), WORDS)
    with pytest.raises(SRDEError, match="no column 'domain', only"):
        by_domain(rows.remove_columns("domain"))


def test_reporters_get_the_figures(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    trainer = trainer_of("SFT", tmp_path, new_model(), max_steps=1)
    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    assert "expert_share/expert0" in seen[0]


# The optimizer


def test_the_optimizer_has_the_groups_of_the_own_training(tmp_path: Path) -> None:
    optimizer = for_trainer(new_model(), muon_lr=0.03, router_lr=0.002, weight_decay=0.1)
    assert isinstance(optimizer, GramMuonAdamW)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: (g["rule"], g["lr"], len(g["params"])) for name, g in groups.items()} == {
        "delta_matrices": ("muon", 0.03, 2),
        "routers": ("adamw", 0.002, 2),
    }
    plain = for_trainer(new_model(), use_muon=False)
    assert [g["name"] for g in plain.param_groups] == ["deltas", "routers"]
    single_weights = for_trainer(tiny_peft(base(), granularity="element"))
    assert [(g["rule"], g["lr"]) for g in single_weights.param_groups] == [("adamw", 0.015), ("adamw", 0.001)]
    parts = get_peft_model(base(), SRDEConfig(num_experts=3, density=0.05))  # quarters of neurons
    assert [(g["name"], g["lr"]) for g in for_trainer(parts).param_groups] == [("deltas", 0.015), ("routers", 0.001)]
    scaled = for_trainer(parts, rate_scale=0.1, router_lr=0.005)
    assert [g["lr"] for g in scaled.param_groups] == pytest.approx([0.0015, 0.005])
    with pytest.raises(SRDEError, match="muon_lr=0.02: GramMuon updates nothing here.*use_muon=True"):
        for_trainer(parts, muon_lr=0.02)
    muon = for_trainer(parts, muon_lr=0.02, use_muon=True)
    assert [(g["name"], g["lr"]) for g in muon.param_groups] == [("delta_matrices", 0.02), ("routers", 0.001)]
    blocks = for_trainer(tiny_peft(base(), granularity="block", density=0.1), learning_rate=0.002)
    assert [g["lr"] for g in blocks.param_groups] == [0.002, 0.001]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"muon_lr": -1.0}, "muon_lr=-1.0: must be at least 0"),
        ({"warmup_steps": 3}, "warmup_steps=3: .* The trainer has its own options"),
        ({"lr": 3}, "lr=3: for_trainer takes use_muon"),
        ({"rate_scale": 0}, "rate_scale=0: must be a number above 0"),
        ({"rate_scale": float("nan")}, "rate_scale=nan: must be"),
        ({"rate_scale": "0.1"}, "rate_scale='0.1': must be"),
        ({"use_muon": "false", "muon_lr": 0.1}, "muon_lr=0.1: GramMuon updates nothing here"),
    ],
)
def test_options_of_the_optimizer_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        for_trainer(new_model(), **options)


def test_what_has_no_rule_is_refused() -> None:
    with pytest.raises(SRDEError, match="it has no experts"):
        for_trainer(base())
    model = new_model()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(SRDEError, match="trained along with the experts"):
        for_trainer(model)


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    weights = []
    for resume in (False, True):
        model = new_model()
        trainer = trainer_of("SFT", tmp_path, model, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        weights.append({name: p.detach().clone() for name, p in model.srde_model().trainable_parameters()})
        assert trainer.optimizer.param_groups[0]["step"] == 4
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert "expert_share/expert0" in state["log_history"][0]


@pytest.mark.parametrize("rows", ["warm_start", "domain_statistics"])
def test_what_needs_a_tokenizer_says_so_before_the_first_step(rows: str, tmp_path: Path) -> None:
    trainer = Trainer(model=new_model(), args=TrainingArguments(str(tmp_path), use_cpu=True))
    trainer.train_dataset = [{"input_ids": [1, 2], "labels": [1, 2]}]
    given: Any = {rows: datasets.Dataset.from_list([{"input_ids": [1, 2]}])}
    trainer.add_callback(SRDECallback(trainer, **given))
    with pytest.raises(SRDEError, match=f"processing_class=None: {rows} needs the tokenizer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(model=base().requires_grad_(True), args=TrainingArguments(str(tmp_path), use_cpu=True))
    trainer.train_dataset = [{"input_ids": [1, 2], "labels": [1, 2]}]
    trainer.add_callback(SRDECallback(trainer))
    with pytest.raises(SRDEError, match="no experts of SRDE"):
        trainer.train()
