#!/usr/bin/env bash
# Training over plain ssh with torchrun on each host, for clusters without pdsh, which `deepspeed --hostfile` needs. Run it in
# the repository's folder, which is at the same place on all hosts, with a hostfile of `srde-ds hosts` and the flags of
# `srde-ds train`:
#
#   cluster/ssh/train.sh cluster/hosts --config run.yaml --output_dir runs/first
#
# MASTER_ADDR: an address of the first host that all others reach (default: its name in the hostfile). MASTER_PORT: 29500.
# The variables in .deepspeed_env (`srde-ds hosts --variables`) go to all ranks. When this script gets SIGTERM or SIGINT, or
# dies for whatever reason, the run saves and ends, and the status is 128 + the signal; when one host fails, the others end.
# First `srde-ds doctor` checks all hosts, and a fatal finding ends the script; PREFLIGHT=false skips this.
set -euo pipefail
hostfile=${1:?train.sh HOSTFILE [--flag value ...]}
shift
hosts=$(python -m srde_ds.cli hosts --hostfile "$hostfile") # the reader that doctor has, too
mapfile -t lines <<<"${hosts// slots=/ }"
variables=(PATH="$PATH")
for file in ~/.deepspeed_env .deepspeed_env; do # the order in which deepspeed reads them
    [ -e "$file" ] || continue
    while read -r variable || [ -n "$variable" ]; do variables+=("$variable"); done <"$file"
done
if [ "${PREFLIGHT:-true}" != false ]; then
    python launch/doctor.py --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" "$@"
fi

# Only this script can write to the pipe that every host reads from: when it is closed, they stop.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/alive"
exec {alive}<>"$folder/alive"
stopped=0
stop() { exec {alive}>&-; }
trap 'stopped=143; stop' TERM
trap 'stopped=130; stop' INT
# The ranks, which are torchrun's children, save and end at USR1. If there are none yet, or they cannot, torchrun ends them.
# shellcheck disable=SC2016  # for the shell of the host, which gets the command as its arguments
watch='exec 3<&0
"$@" & run=$!
(cat; pkill -USR1 -P "$run" && timeout 120 tail --pid="$run" -f /dev/null || kill -TERM "$run") <&3 >/dev/null 2>&1 &
wait "$run"'

declare -A host_of
node=0
for line in "${lines[@]}"; do
    read -r host slots <<<"$line"
    # As long as the ranks wait for each other (--start_timeout).
    first=${lines[0]% *}
    torchrun=(torchrun --nnodes "${#lines[@]}" --node_rank "$node" --nproc_per_node "$slots" --rdzv_conf timeout=80
        --master_addr "${MASTER_ADDR:-${first#*@}}" --master_port "${MASTER_PORT:-29500}")
    command=(env -C "$PWD" "${variables[@]}" "${torchrun[@]}" launch/train.py "$@")
    ssh -o ServerAliveInterval=15 "$host" "$(printf '%q ' bash -c "$watch" watch "${command[@]}")" \
        <"$folder/alive" {alive}>&- &
    host_of[$!]=$host
    node=$((node + 1))
done

status=0
while [ "${#host_of[@]}" -gt 0 ]; do
    code=0
    wait -n -p ended "${!host_of[@]}" || code=$?
    [ -n "${ended:-}" ] || continue # a signal to this script ended `wait`
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$code
        if [ "$stopped" -eq 0 ]; then
            echo "ssh/train.sh: ${host_of[$ended]} ended with status $code" >&2
            stop
        fi
    fi
    unset "host_of[$ended]"
done
# torchrun returns 1 for ranks that a signal has stopped, and 0 if they have finished even so.
if [ "$status" -ne 0 ] && [ "$stopped" -ne 0 ]; then status=$stopped; fi
exit "$status"
