"""Supervised training of SRDE experts with TRL's SFTTrainer.

    python examples/sft_trl.py --base HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --held_out held_out.jsonl

Each line of a file is a record as for `srde-ds train`: `prompt` and `response`, or `messages`, and `domain`.
"""

from __future__ import annotations

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from srde_ds.optim import for_trainer
from srde_ds.peft import SRDEConfig
from srde_ds.peft.callback import SRDECallback
from srde_ds.peft.rows import by_domain, conversations_of


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Supervised training of SRDE experts with TRL's SFTTrainer.")
    parser.add_argument("--base", required=True, help="folder or name of the base model")
    parser.add_argument("--data", required=True, help="records to train on")
    parser.add_argument("--held_out", required=True, help="records for the losses by domain")
    parser.add_argument("--domains", default="math,logic,code,science,planning,abstract", help="one expert each")
    parser.add_argument("--output", default="sft", help="folder for the adapter")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args()

    domains = options.domains.split(",")
    base = AutoModelForCausalLM.from_pretrained(options.base)
    model = get_peft_model(base, SRDEConfig(num_experts=len(domains), top_k=1, density=0.05, expert_names=domains))
    arguments = SFTConfig(
        output_dir=options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        eval_strategy="steps",
        eval_steps=max(1, options.max_steps // 2),
        logging_steps=max(1, options.max_steps // 20),
        save_strategy="no",
        report_to=[],
        bf16=options.bf16,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=conversations_of(options.data, domains),
        eval_dataset=by_domain(conversations_of(options.held_out, domains)),
        processing_class=AutoTokenizer.from_pretrained(options.base),
        optimizers=(for_trainer(model), None),
    )
    trainer.add_callback(SRDECallback(trainer, warm_start=trainer.train_dataset))
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
