#!/usr/bin/env bash
# From a fresh rented machine to trained experts. Safe to run again after a restart or an error: existing results are used.
#
# In the instance's on-start script (put tokens into the account's environment variables, not into this text):
#
#   git clone https://github.com/OWNER/srde_ds /workspace/srde_ds
#   bash /workspace/srde_ds/cluster/vastai_startup.sh >> /workspace/srde.log 2>&1
#
# Environment variables:
#   MODEL_NAME           base, Hub id or folder
#   EXAMPLES_PER_DOMAIN  documents of each domain (100000)
#   MAX_STEPS            optimizer steps (10000)
#   MAX_LENGTH           tokens of a row (2048)
#   OUTPUT_DIR           folder of the run (/workspace/runs/srde)
#   WORK_DIR             folder of the data (/workspace/data)
#   SOURCES_FILE         your own sources instead of those of the six domains (docs/data.md)
#   TRAIN_ARGUMENTS      more flags of `srde-ds train`, split at blanks
#   CONVERT_TO           a further export at the end: moe or gguf (docs/convert.md)
#   UPLOAD_REPO          private Hub repository for the weights at the end, made if it does not exist
#   MAX_RESTARTS         restarts of training after failures (3)
#   PREFLIGHT            false: do not check the machine before training (true)
#   ENVIRONMENT          a Python environment with srde-ds in it, instead of installing one
#   HF_TOKEN             for gated bases and the upload; the Hub's library reads it from the environment
#   WEBHOOK_URL          gets JSON when the state changes; srde-ds reads it from the environment
#
# The two secrets are never passed as arguments, written or printed. All versions are pinned: this checkout, constraints.txt.
set -euo pipefail
set +x # whoever called this with -x would print the environment's secrets
cd "$(dirname "$0")/.."

: "${MODEL_NAME:=mistralai/Ministral-3-14B-Reasoning-2512}" "${EXAMPLES_PER_DOMAIN:=100000}" "${MAX_STEPS:=10000}"
: "${MAX_LENGTH:=2048}" "${OUTPUT_DIR:=/workspace/runs/srde}" "${WORK_DIR:=/workspace/data}" "${SOURCES_FILE:=}"
: "${TRAIN_ARGUMENTS:=}" "${CONVERT_TO:=}" "${UPLOAD_REPO:=}" "${MAX_RESTARTS:=3}" "${ENVIRONMENT:=}" "${PREFLIGHT:=true}"

task=setting-up
monitor=
finish() {
    status=$?
    if [ -n "$monitor" ]; then kill "$monitor" 2>/dev/null || true; fi
    if [ "$status" -ne 0 ]; then
        say failed "$task ended with status $status; $OUTPUT_DIR and the log say why"
    fi
}
trap finish EXIT

# say STATE TEXT: to the log, and to the webhook if there is one. Never ends the script.
say() {
    echo "vastai_startup: $1: $2"
    if [ -n "${WEBHOOK_URL:-}" ] && command -v srde-ds >/dev/null; then
        python - "$1" "$2" <<'PYTHON' || true
import sys
from srde_ds.cluster.monitor import Observation, notify, webhook_from_environment
notify(webhook_from_environment(), Observation(sys.argv[1], sys.argv[2]))
PYTHON
    fi
}

# upload [RESULT...]: into UPLOAD_REPO; without results it only checks what can be known before. Unlike hf, it does not
# publish results because the repository exists and is public.
upload() {
    python - "$UPLOAD_REPO" "$@" <<'PYTHON'
import sys
from pathlib import Path
from huggingface_hub import get_token
from srde_ds.errors import SRDEError
from srde_ds.utils.upload import Upload

repo, *results = sys.argv[1:]
upload = Upload(repo, "model", True, get_token(), f"UPLOAD_REPO={repo}")
try:
    upload.check()
    upload.refuse_public()
    for result in map(Path, results):
        whole = result.is_dir()
        upload.send(result if whole else result.parent, f"Add {result.name}", None if whole else [result.name])
except SRDEError as error:
    sys.exit(f"vastai_startup: error: {error}")
PYTHON
}

mkdir -p "$OUTPUT_DIR" "$WORK_DIR"
exec 9>"$WORK_DIR/.lock"
flock --nonblock 9 || { echo "vastai_startup: another one is at work in $WORK_DIR" >&2; trap - EXIT; exit 3; }

task=installation
if [ -z "$ENVIRONMENT" ]; then
    make env
    ENVIRONMENT=$PWD/.venv
fi
export PATH="$ENVIRONMENT/bin:$PATH"

task="upload's check"
if [ -n "$UPLOAD_REPO" ]; then upload; fi

task=data
if [ ! -e "$WORK_DIR/tokenized/manifest.json" ]; then
    say building "data, $EXAMPLES_PER_DOMAIN documents a domain"
    sources=()
    if [ -n "$SOURCES_FILE" ]; then sources=(--sources_file "$SOURCES_FILE"); fi
    srde-ds build_dataset --examples_per_domain "$EXAMPLES_PER_DOMAIN" --model_name "$MODEL_NAME" \
        --max_length "$MAX_LENGTH" --work_dir "$WORK_DIR" "${sources[@]}"
fi

task=training
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus | wc -l); fi
if [ "$gpus" -gt 0 ]; then
    launcher=(deepspeed --num_gpus "$gpus" launch/train.py)
    ds_config=ds_configs/zero3.json
else
    export DS_ACCELERATOR=cpu
    launcher=(srde-ds train)
    ds_config=ds_configs/zero3_small_base.json
fi
say training "$gpus GPUs, $MAX_STEPS steps, into $OUTPUT_DIR"
if [ -n "${WEBHOOK_URL:-}" ]; then
    # Not before training is at work: completed.json may be that of a run with fewer steps.
    (while [ ! -e "$OUTPUT_DIR/run.lock" ]; do sleep 1; done; exec srde-ds monitor "$OUTPUT_DIR") 9>&- &
    monitor=$!
fi
read -ra more <<<"$TRAIN_ARGUMENTS"
# Continues from the last checkpoint if there is one, and does nothing for a finished run.
srde-ds supervise --max_restarts "$MAX_RESTARTS" --preflight "$PREFLIGHT" -- "${launcher[@]}" --model_name "$MODEL_NAME" \
    --pretokenized_dir "$WORK_DIR/tokenized" --max_length "$MAX_LENGTH" --output_dir "$OUTPUT_DIR" \
    --max_steps "$MAX_STEPS" --deepspeed_config "$ds_config" "${more[@]}"

results=("$OUTPUT_DIR/srde_weights.safetensors")
if [ -n "$CONVERT_TO" ]; then
    task=conversion
    converted=$OUTPUT_DIR/converted-$CONVERT_TO
    if [ "$CONVERT_TO" = gguf ]; then converted=$converted.gguf; fi
    if [ ! -e "$converted" ] || [ "${results[0]}" -nt "$converted" ]; then # none, or of fewer steps
        # Under another name until it is complete.
        partial=$OUTPUT_DIR/partial-${converted##*/}
        rm -rf "$partial" "$converted"
        srde-ds convert --checkpoint "$OUTPUT_DIR" --to "$CONVERT_TO" --output "$partial"
        mv "$partial" "$converted"
    fi
    results+=("$converted")
fi

if [ -n "$UPLOAD_REPO" ]; then
    task=upload
    upload "${results[@]}"
fi
say 'done' "results: ${results[*]}"
