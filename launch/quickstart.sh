#!/usr/bin/env bash
# The main job at small scale: a real base, six domains of real tasks, training, evaluation, report.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
inputs=runs/quickstart-inputs
run=runs/quickstart

gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    processes=$gpus
else
    # Two processes with one thread each: the same work as one process with two, but through ZeRO-3's collectives.
    processes=2
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PATH="$PWD/$bin:$PATH"

"$bin/python" launch/quickstart_inputs.py "$inputs"
if [ ! -e "$run/completed.json" ]; then
    resume=()
    if [ -e "$run/latest" ]; then resume=(--resume_from latest); fi
    "$bin/deepspeed" --num_gpus "$processes" launch/train.py --config launch/quickstart.yaml --output_dir "$run" "${resume[@]}"
    # The launcher may return 0 although a process died: the marker is the proof.
    [ -e "$run/completed.json" ] || { echo "quickstart: training did not finish, see above" >&2; exit 1; }
fi
"$bin/python" launch/evaluate.py --checkpoint "$run" --eval_file "$inputs/held_out.jsonl" --compare_baseline
"$bin/python" launch/report.py --run "$run"
