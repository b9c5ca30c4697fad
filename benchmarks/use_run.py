"""What a person does with a finished run, on the quick start's: every way once, with what it printed.

python -m benchmarks.use_run        # where runs/quickstart and runs/quickstart-inputs are; some minutes

Writes docs/quickstart/use.md. A command that fails ends it, and nothing is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from srde_ds.utils.environment import environment

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/quickstart/use.md"

QUESTION = (
    "Courses and what they need first: 4 needs 2; 0 needs 4; 1 needs 2; 3 needs 1; 0 needs 3; 4 needs 3; 3 needs 0. "
    "Can all be taken? Answer True or False."
)
ITEMS = [
    {"prompt": "Is 7 a prime number? Answer True or False.", "choices": ["True", "False"], "answer": "True"}
    | {"response": "True", "domain": "logic"},
    {"prompt": "Write a Python function add(a, b) that returns the sum of a and b.", "tests": "assert add(2, 3) == 5"}
    | {"response": "def add(a, b):\n    return a + b", "domain": "code"},
    {"prompt": "Reduce the fraction 12/16. Answer with the fraction.", "answer": "\\frac{3}{4}"}
    | {"response": "3/4", "domain": "math"},
]
TASK = """task: held_out_science
dataset_path: json
dataset_kwargs: {data_files: {test: $WORK/science.jsonl}, cache_dir: $WORK/cache}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
PREAMBLE = f"""import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("runs/quickstart-inputs/base", trust_remote_code=False)
chat = [{{"role": "user", "content": "{QUESTION}"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

def answer(model):
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
"""
PYTHON = """from srde_ds import SRDEModel

base, adapter = "runs/quickstart-inputs/base", "runs/quickstart"
model = SRDEModel.from_pretrained(base, adapter)
print("experts:", answer(model))
with model.no_experts():
    print("bare base:", answer(model))
model.set_active_experts(["planning"])
print("planning alone:", answer(model))
model.set_active_experts(None)
chatbot = pipeline("text-generation", model=model.base, tokenizer=tokenizer)
print("pipeline:", chatbot(chat, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"])
with torch.no_grad():
    plain = model.base(**inputs, use_cache=False).logits
    graph = torch.compile(model.base, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).logits
print("compiled in one graph, largest difference of logits:", f"{(graph - plain).abs().max():.1g}")
print("saved:", model.save_pretrained("$WORK/adapter"))
again = SRDEModel.from_pretrained(base, "$WORK/adapter")
print("saved and loaded:", answer(again))
merged = again.merge_and_unload(expert="planning")
print("merged:", type(merged).__name__, answer(merged))
"""
STOCK = """import sys

for folder in ("$WORK/moe", "$WORK/planning"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    print(folder, type(model).__name__, model.dtype, answer(model))
print("srde_ds is loaded:", "srde_ds" in sys.modules)
"""
COMPARE = """import json
from os.path import expandvars
files = [open(expandvars(f"$WORK/{name}/evaluation_items.jsonl")) for name in ("one", "two")]
one, two = ([json.loads(line) for line in file] for file in files)
pairs = [(a[model], b[model]) for a, b in zip(one, two, strict=True) for model in ("srde", "base")]
print("same predictions:", all(a["prediction"] == b["prediction"] for a, b in pairs))
print("largest relative difference of losses:", max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs))
"""
EVALUATE = "--checkpoint runs/quickstart --bf16 false"
INFERENCE = "srde-ds inference --srde_weights runs/quickstart --bf16 false --max_tokens 12"
WAYS: list[tuple[str, list[str]]] = [
    (
        "Evaluation",
        [
            f"srde-ds evaluate {EVALUATE} --eval_file runs/quickstart-inputs/held_out.jsonl --compare_baseline "
            "--each_expert --max_samples 6 --max_new_tokens 24 --output_file $WORK/one/evaluation.json",
            f"deepspeed --num_gpus 2 {ROOT}/launch/evaluate.py {EVALUATE} "
            "--eval_file runs/quickstart-inputs/held_out.jsonl --compare_baseline --each_expert --max_samples 6 "
            "--max_new_tokens 24 --output_file $WORK/two/evaluation.json | grep -E '^(overall|Written)'",
            f"python -c '{COMPARE}'",
            "cat $WORK/items.jsonl",
            f"srde-ds evaluate {EVALUATE} --eval_file $WORK/items.jsonl --run_code --output_file $WORK/kinds.json",
            "python -m srde_ds.evaluation.harness run --model srde --model_args "
            "srde_weights=runs/quickstart,dtype=float32 --include_path $WORK --tasks held_out_science "
            "--batch_size 4 --apply_chat_template",
        ],
    ),
    (
        "Inference",
        [
            f'{INFERENCE} --temperature 0 --prompt "{QUESTION}"',
            f"{INFERENCE} --temperature 0 --show_routing --prompt 'Calculate 7 * 5.' | tail -n 4",
            "cat $WORK/prompts.txt",
            f"{INFERENCE} --temperature 0 --prompts_file $WORK/prompts.txt",
            f"{INFERENCE} --best_of_n 5 --prompt 'Calculate 7 * 5. Answer with the number.'",
            f"{INFERENCE} --self_refine 1 --temperature 0 --prompt 'Calculate 7 * 5. Answer with the number.'",
            "cat $WORK/chat.txt",
            f"COLUMNS=60 {INFERENCE} --interactive --stream --temperature 0 < $WORK/chat.txt",
        ],
    ),
    (
        "Conversion",
        [
            "srde-ds convert --checkpoint runs/quickstart --dtype bfloat16 --experts math,logic --output $WORK/two.bin",
            "srde-ds convert --checkpoint runs/quickstart/checkpoint-26 --output $WORK/all.safetensors",
            "cmp $WORK/all.safetensors runs/quickstart/srde_weights.safetensors && echo 'the same file'",
            "srde-ds convert --checkpoint runs/quickstart --to dense --expert planning --dtype float32 "
            "--output $WORK/planning",
            "srde-ds convert --checkpoint runs/quickstart --to moe --dtype float32 --output $WORK/moe",
        ],
    ),
]
CHAT = '''Calculate 7 * 5.\\
Answer with the number.
/expert math
"""
And
8 * 5?
"""
/expert
/base
Is 7 a prime number?
/reset
/quit
'''


def ran(command: list[str], work: Path) -> str:
    """What a command says on standard output; the work folder's name is left out. Raises SystemExit if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[-1]}\n{done.stdout}{done.stderr}")
    return done.stdout.replace(str(work), "$WORK").rstrip()


def main() -> None:
    started = time.monotonic()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # for deepspeed's launcher
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    held_out = Path("runs/quickstart-inputs/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    parts = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["WORK"] = name
        science = [line for line in held_out if json.loads(line)["domain"] == "science"][:8]
        for file, text in (
            ("items.jsonl", "".join(json.dumps(item) + "\n" for item in ITEMS)),
            ("prompts.txt", "Calculate 7 * 5.\nReduce the fraction 24/56. Answer with the fraction.\n"),
            ("chat.txt", CHAT),
            ("science.jsonl", "\n".join(science) + "\n"),
            ("held_out_science.yaml", TASK.replace("$WORK", name)),
        ):
            (work / file).write_text(text, encoding="utf-8")
        for title, commands in WAYS:
            outputs = [(command, ran(["bash", "-o", "pipefail", "-c", command], work)) for command in commands]
            blocks = [f"$ {command.replace(f'{ROOT}/', '')}\n{output}" for command, output in outputs]
            parts.append(f"## {title}\n\n```\n" + "\n\n".join(blocks) + "\n```")
        for title, code in (("Python", PYTHON), ("What transformers alone makes of it", STOCK)):
            output = ran([sys.executable, "-c", (PREAMBLE + code).replace("$WORK", name)], work)
            parts.append(f"## {title}\n\n```python\n{PREAMBLE}\n{code}```\n\n```\n{output}\n```")
        card = (work / "adapter/README.md").read_text(encoding="utf-8")
    about = environment()
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    head = (
        "# The quick start's result in use\n\nWritten by `benchmarks/use_run.py`: each command as it was run and what "
        f"it printed on standard output, in {time.monotonic() - started:.0f} s on {about['machine']}, revision "
        f"{about['git_revision']}; {versions}. `$WORK` is an empty folder."
    )
    parts.append(f"## The model card of `save_pretrained`\n\n````markdown\n{card.rstrip()}\n````")
    PAGE.write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
