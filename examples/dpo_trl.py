"""Preference training of an SRDE adapter with TRL's DPOTrainer.

    python examples/dpo_trl.py --adapter sft --data preferences.jsonl

Each line of the file has `prompt`, `chosen` and `rejected`, as lists of messages or texts. The reference is the initial
adapter, of which TRL keeps a frozen copy.
"""

from __future__ import annotations

import argparse

import datasets
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import srde_ds.peft  # noqa: F401  makes the method known to PEFT
from srde_ds.optim import for_trainer
from srde_ds.peft.callback import SRDECallback


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Preference training of an SRDE adapter with TRL's DPOTrainer.")
    parser.add_argument("--adapter", required=True, help="folder of a trained adapter, such as that of sft_trl.py")
    parser.add_argument("--data", required=True, help="prompts with a chosen and a rejected response")
    parser.add_argument("--output", default="dpo", help="folder for the adapter")
    parser.add_argument("--beta", type=float, default=0.1, help="how much the distance from the reference counts")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args()

    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter, is_trainable=True)
    arguments = DPOConfig(
        output_dir=options.output,
        beta=options.beta,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        logging_steps=max(1, options.max_steps // 20),
        save_strategy="no",
        report_to=[],
        bf16=options.bf16,
    )
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path),
        optimizers=(for_trainer(model, rate_scale=0.1), None),
    )
    trainer.add_callback(SRDECallback(trainer))
    trainer.train()
    model.save_pretrained(options.output, selected_adapters=["default"])


if __name__ == "__main__":
    main()
