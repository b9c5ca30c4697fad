#!/usr/bin/env bash
# The main job at small scale: a real base, six domains of real tasks, training, evaluation, report.
# If it is interrupted, it continues where it stopped when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
inputs=runs/quickstart-inputs
run=runs/quickstart

processes=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$processes" -eq 0 ]; then
    processes=2
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
fi
bf16=$(python launch/fastest_dtype.py)
echo "quickstart: $processes processes, $([ "$bf16" = true ] && echo bfloat16 || echo float32)"

python launch/quickstart_inputs.py "$inputs"
if [ ! -e "$run/completed.json" ]; then
    resume=()
    if [ -e "$run/latest" ]; then resume=(--resume_from latest); fi
    if [ "${PREFLIGHT:-true}" != false ]; then
        python launch/doctor.py --processes "$processes" --config launch/quickstart.yaml --output_dir "$run" --bf16 "$bf16"
    fi
    deepspeed --num_gpus "$processes" launch/train.py --config launch/quickstart.yaml --output_dir "$run" \
        --bf16 "$bf16" "${resume[@]}"
    # The launcher may return 0 although a process has died, so only the marker counts.
    [ -e "$run/completed.json" ] || { echo "quickstart: training did not finish, see above" >&2; exit 1; }
fi
unset OMP_NUM_THREADS
python launch/evaluate.py --checkpoint "$run" --eval_file "$inputs/held_out.jsonl" --compare_baseline --bf16 "$bf16" \
    --max_new_tokens 24
python launch/report.py --run "$run"
echo "quickstart: report in $run/report.md, figures in $run/evaluation.json"
echo "quickstart: the page to look at: $PWD/$run/report.html"
