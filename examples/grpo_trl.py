"""Reinforcement learning of an SRDE adapter with TRL's GRPOTrainer and verifiable rewards.

    python examples/grpo_trl.py --adapter sft --items items.jsonl

Each line of the file is an item as for `srde-ds evaluate`, with an `answer` or `choices`; with --run_code also `tests`.
"""

from __future__ import annotations

import argparse
from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import srde_ds.peft  # noqa: F401  makes the method known to PEFT
from srde_ds.evaluation.rewards import AnswerReward, prompts_of
from srde_ds.optim import for_trainer
from srde_ds.peft.callback import SRDECallback


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Reinforcement learning of an SRDE adapter with TRL's GRPOTrainer.")
    parser.add_argument("--adapter", required=True, help="folder of a trained adapter, such as that of sft_trl.py")
    parser.add_argument("--items", required=True, help="items with answers")
    parser.add_argument("--output", default="grpo", help="folder for the adapter")
    parser.add_argument("--generations", type=int, default=8, help="answers to compare for each prompt")
    parser.add_argument("--max_completion_length", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--run_code", action="store_true", help="run the programs of items with tests in bubblewrap")
    options = parser.parse_args()

    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter, is_trainable=True)
    config = model.peft_config["default"]
    rewards: Any = AnswerReward(sandbox="bubblewrap" if options.run_code else None)
    arguments = GRPOConfig(
        output_dir=options.output,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.generations,
        num_generations=options.generations,
        max_completion_length=options.max_completion_length,
        logging_steps=max(1, options.max_steps // 20),
        save_strategy="no",
        report_to=[],
        bf16=options.bf16,
    )
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        reward_funcs=[rewards],
        train_dataset=prompts_of(options.items, config.names, run_code=options.run_code),
        processing_class=AutoTokenizer.from_pretrained(config.base_model_name_or_path),
        optimizers=(for_trainer(model, rate_scale=0.05, router_lr=1e-4), None),
    )
    trainer.add_callback(SRDECallback(trainer))
    trainer.train()
    print(f"scorers that failed: {rewards.failures.total()}")
    model.save_pretrained(options.output, selected_adapters=["default"])


if __name__ == "__main__":
    main()
