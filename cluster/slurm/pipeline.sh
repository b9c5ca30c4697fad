#!/usr/bin/env bash
# Build the dataset, train, evaluate and convert, as Slurm jobs that each wait for the previous one. Run it in the
# repository's folder, on a node that can submit jobs; arguments go to training:
#
#   MODEL_NAME=BASE OUTPUT_DIR=runs/first EVAL_FILE=held_out.jsonl EXAMPLES_PER_DOMAIN=20000 \
#       TRAIN_SBATCH='--nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 8:00:00' VERB_SBATCH='--gpus 1' \
#       cluster/slurm/pipeline.sh --max_steps 2000 --gradient_checkpointing
#
# JSONL_DATA instead of EXAMPLES_PER_DOMAIN: your own records. WORK_DIR (data): folder for the dataset.
# BUILD_FLAGS, EVALUATE_FLAGS, CONVERT_FLAGS: more flags of these verbs, separated by spaces.
# BUILD_SBATCH, TRAIN_SBATCH, VERB_SBATCH: options of sbatch for building, for training, for the two after it.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${MODEL_NAME:?the base, an id or a folder}" "${OUTPUT_DIR:?a folder for the run}" "${EVAL_FILE:?held-out JSONL}"
work_dir=${WORK_DIR:-data}
if [ -n "${JSONL_DATA:-}" ]; then
    source_flags=(--jsonl_data "$JSONL_DATA")
else
    source_flags=(--examples_per_domain "${EXAMPLES_PER_DOMAIN:?give it or JSONL_DATA}")
fi
read -ra build_flags <<<"${BUILD_FLAGS:-}"
read -ra evaluate_flags <<<"${EVALUATE_FLAGS:-}"
read -ra convert_flags <<<"${CONVERT_FLAGS:-}"
read -ra build_sbatch <<<"${BUILD_SBATCH:-}"
read -ra train_sbatch <<<"${TRAIN_SBATCH:-}"
read -ra verb_sbatch <<<"${VERB_SBATCH:-${STAGE_SBATCH:-}}" # STAGE_SBATCH: the older name

submit() { # NAME FORMER_JOB_ID OPTION... SCRIPT ARGUMENT...: prints the job's id
    local dependency=()
    [ -z "$2" ] || dependency=(--dependency "afterok:$2" --kill-on-invalid-dep=yes)
    sbatch --parsable --job-name "srde-$1" "${dependency[@]}" "${@:3}"
}

build=$(submit build '' "${build_sbatch[@]}" cluster/slurm/verb.sbatch build_dataset \
    --model_name "$MODEL_NAME" "${source_flags[@]}" --work_dir "$work_dir" "${build_flags[@]}")
train=$(submit train "$build" "${train_sbatch[@]}" cluster/slurm/train.sbatch \
    --model_name "$MODEL_NAME" --pretokenized_dir "$work_dir/tokenized" --output_dir "$OUTPUT_DIR" "$@")
evaluate=$(submit evaluate "$train" "${verb_sbatch[@]}" cluster/slurm/verb.sbatch evaluate \
    --checkpoint "$OUTPUT_DIR" --eval_file "$EVAL_FILE" "${evaluate_flags[@]}")
convert=$(submit convert "$train" "${verb_sbatch[@]}" cluster/slurm/verb.sbatch convert \
    --checkpoint "$OUTPUT_DIR" --output_file "$OUTPUT_DIR/export/srde_weights.safetensors" "${convert_flags[@]}")
echo "build $build -> train $train -> evaluate $evaluate, convert $convert"
