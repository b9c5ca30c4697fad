"""Train, save, load, evaluate and export: SRDE with PEFT and TRL. Reads base/, train.jsonl and held_out.jsonl."""

import subprocess

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from srde_ds.optim import for_trainer
from srde_ds.peft import SRDEConfig
from srde_ds.peft.callback import SRDECallback
from srde_ds.peft.rows import conversations_of

domains = ["red", "green"]
config = SRDEConfig(num_experts=2, top_k=1, density=0.05, expert_names=domains)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="adapter", max_steps=4, report_to=[], bf16=False),
    train_dataset=conversations_of("train.jsonl", domains),
    processing_class=AutoTokenizer.from_pretrained("base"),
    optimizers=(for_trainer(model), None),
)
trainer.add_callback(SRDECallback(trainer, warm_start=trainer.train_dataset))
trainer.train()
model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
loaded.print_trainable_parameters()
subprocess.run(["srde-ds", "evaluate", "adapter", "--eval_file", "held_out.jsonl"], check=True)
subprocess.run(["srde-ds", "convert", "adapter", "--to", "moe", "--output", "moe"], check=True)
