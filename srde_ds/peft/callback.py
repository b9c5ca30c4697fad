"""SRDE in the trainers of transformers and TRL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srde_ds.errors import SRDEError
from srde_ds.peft.statistics import measure_domains
from srde_ds.peft.warm_start import warm_start_routers
from srde_ds.training.reporting.step_metrics import expert_metrics

SHARES = "srde_expert_share"
"""Key of the experts' shares among the callbacks' states in a checkpoint's `trainer_state.json`"""


class SRDECallback(TrainerCallback):
    """Balances over all processes and micro-batches, runs the routers' warm start, and adds the experts to the logs.

        trainer = SFTTrainer(model=get_peft_model(base, SRDEConfig(...)), ...)
        trainer.add_callback(SRDECallback(trainer))

    The logs get `load_balancing_loss`, `router_z_loss` and `router_entropy`, averaged over the tokens since the last
    log, and `expert_share/NAME`, the share of those tokens' assignments that went to each expert.

    Args:
        trainer: the trainer that gets the callback; its logs are extended.
        warm_start: rows for `warm_start_routers`, which is called before the first step.
        domain_statistics: rows for `measure_domains`, which is called at the end of training. The adapter that is saved
            afterwards can be combined with others.

    Raises:
        SRDEError: the trainer would drop its optimizer. When training begins: its arguments would give wrong results.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        warm_start: datasets.Dataset | None = None,
        domain_statistics: datasets.Dataset | None = None,
    ) -> None:
        if trainer.is_deepspeed_enabled and trainer.optimizer is not None:
            raise SRDEError(
                "optimizers: with DeepSpeed, transformers drops the optimizer that it is given and uses AdamW. Leave "
                "it out, leave DeepSpeed out, or train with srde-ds, whose GramMuon works under ZeRO."
            )
        self._trainer, self._warm_start, self._domain_statistics = trainer, warm_start, domain_statistics
        self._sums: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the arguments, restore the balance when resuming, and run the warm start if rows were given for it."""
        _check(args)
        model = kwargs["model"]
        if not hasattr(model, "training_steps"):
            raise SRDEError(
                f"model of type {type(model).__name__}: it has no experts of SRDE. Give the trainer the result of "
                "get_peft_model(base, SRDEConfig(...)), or the SRDEConfig as peft_config."
            )
        rows = {"warm_start": self._warm_start, "domain_statistics": self._domain_statistics}
        asked = [name for name, given in rows.items() if given is not None]
        if asked and kwargs["processing_class"] is None:
            raise SRDEError(
                f"processing_class=None: {asked[0]} needs the tokenizer, to know special tokens. Give the trainer "
                "processing_class=tokenizer."
            )
        model.training_steps.micro_steps = args.gradient_accumulation_steps
        model.training_steps.finish()  # from now on only this call ends a step: ZeRO clears gradients within a step
        stored: Any = state.stateful_callbacks
        if SHARES in stored:
            model.training_steps.expert_share = torch.tensor(stored[SHARES], device=args.device)
        # Callbacks get the logs in turn, so this one has to add its figures before the reporters read them.
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        if self._warm_start is not None and state.global_step == 0:
            if self._trainer.is_deepspeed_enabled:
                raise SRDEError(
                    "warm_start: DeepSpeed has already copied the routers. Call "
                    "srde_ds.peft.warm_start.warm_start_routers before you make the trainer."
                )
            warm_start_routers(model, self._warm_start, kwargs["processing_class"], seed=args.seed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collect the step's statistics, which balance the next step."""
        steps = kwargs["model"].training_steps
        for name, own in steps.finish().items():
            self._sums[name] = self._sums[name] + own if name in self._sums else own
        if steps.expert_share is not None:
            stored: Any = state.stateful_callbacks
            stored[SHARES] = steps.expert_share.tolist()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the domains, if rows were given for it."""
        if self._domain_statistics is not None:
            measure_domains(kwargs["model"], self._domain_statistics, kwargs["processing_class"], seed=args.seed)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the experts' figures to the trainer's logs."""
        if logs is None or "loss" not in logs or not self._sums:
            return
        found = dict(self._figures(kwargs["model"].srde_model().expert_names))
        self._sums = {}
        logs.update(found)
        state.log_history[-1].update(found)

    def _figures(self, names: list[str]) -> Iterator[tuple[str, float]]:
        metrics = expert_metrics(self._sums)
        for name in ("load_balancing_loss", "router_z_loss", "router_entropy"):
            yield name, metrics[name]
        total = sum(metrics["tokens_per_expert"])
        for name, tokens in zip(names, metrics["tokens_per_expert"], strict=True):
            yield f"expert_share/{name}", tokens / total


def _check(args: TrainingArguments) -> None:
    """Raise SRDEError if the arguments would silently give wrong results."""
    if args.fp16:
        raise SRDEError(
            "fp16=True: float16 training scales the loss, but not the gradients of the router's losses, which would "
            "vanish beside it. Train with bf16=True, or in float32."
        )
    if args.n_gpu > 1:
        raise SRDEError(
            f"n_gpu={args.n_gpu}: in one process transformers copies the model to all GPUs with torch.nn.DataParallel, "
            "which experts do not support. Start it with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES=0."
        )
    if getattr(args, "packing", False) and getattr(args, "packing_strategy", "") == "wrapped":
        raise SRDEError(
            "packing_strategy=wrapped: tokens would attend to other documents in their row. Use 'bfd' or 'bfd_split', "
            "which keep documents apart."
        )
    flattened = getattr(args, "padding_free", False) or getattr(args, "packing", False)
    if flattened and getattr(args, "pad_to_multiple_of", None):
        raise SRDEError(
            f"pad_to_multiple_of={args.pad_to_multiple_of}: to the routers, padding in flattened batches looks "  # type: ignore[attr-defined]
            "like real tokens. Leave it out."
        )
