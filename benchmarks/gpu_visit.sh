#!/usr/bin/env bash
# Everything that one GPU can answer in eight minutes, see gpu_visit.md.
#   benchmarks/gpu_visit.sh [FILE] [--rehearse]        PARTS="model engine": only these
# A part that runs out of its time loses what it has not yet written, and the next one begins.
set -u
cd "$(dirname "$0")/.." || exit 1
file=${1:-gpu_visit.jsonl}
rehearse=${2:-}
slower=$([[ $rehearse ]] && echo 4 || echo 1) # a CPU, perhaps beside other work
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1
failed=0
while read -r part seconds; do
  [[ " ${PARTS:-$part} " == *" $part "* ]] || continue
  seconds=$((seconds * slower))
  echo "== $part: at most $seconds s"
  timeout --kill-after=5 "$seconds" "$python" -m benchmarks.gpu_visit "$part" --output_file "$file" ${rehearse:+"$rehearse"} ||
    { echo "== $part: ended with status $?"; failed=1; }
done <<'PARTS'
machine 35
layer 60
model 150
engine 85
decode 60
tests 90
PARTS
exit $failed
