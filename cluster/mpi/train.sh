#!/usr/bin/env bash
# Training with Open MPI's mpirun; the ranks find each other through mpi4py (`pip install mpi4py`, or the extra "mpi"). Run it
# in the repository's folder with a hostfile of `srde-ds hosts` and the flags of `srde-ds train`:
#
#   cluster/mpi/train.sh cluster/hosts --config run.yaml --output_dir runs/first
#
# INTERFACE=eth0 names the network interface between the hosts, if they have several. The variables in .deepspeed_env
# (`srde-ds hosts --variables`), in the home folder or here, go to all ranks. SIGTERM, SIGINT and SIGUSR1 to this script save
# and stop the run; the status is then 128 + the signal. First `srde-ds doctor` checks all hosts over ssh, and a fatal finding
# ends the script; PREFLIGHT=false skips this.
set -euo pipefail
hostfile=${1:?train.sh HOSTFILE [--flag value ...]}
shift
if [ "${PREFLIGHT:-true}" != false ]; then python launch/doctor.py --hostfile "$hostfile" "$@"; fi
options=(--hostfile "$hostfile" --map-by slot --bind-to none) # one rank a slot, in the order of the file
if [ -n "${INTERFACE:-}" ]; then
    options+=(--mca oob_tcp_if_include "$INTERFACE" --mca btl_tcp_if_include "$INTERFACE")
fi
if [ "$(id -u)" -eq 0 ]; then options+=(--allow-run-as-root); fi # as in most containers
for file in ~/.deepspeed_env .deepspeed_env; do # the order in which deepspeed reads them
    [ -e "$file" ] || continue
    while read -r variable || [ -n "$variable" ]; do options+=(-x "$variable"); done <"$file"
done

# mpirun kills the ranks a second after SIGTERM or Ctrl-C, but passes USR1 on. A separate session keeps Ctrl-C from it.
setsid mpirun "${options[@]}" -x PATH python -u launch/train.py "$@" &
mpirun=$!
stopped=0
# shellcheck disable=SC2317  # the traps call it
stop() {
    stopped=$((128 + $(kill -l "$1")))
    kill -USR1 "$mpirun" 2>/dev/null || true
}
for signal in USR1 TERM INT; do
    # shellcheck disable=SC2064  # the name that it has now
    trap "stop $signal" "$signal"
done
status=0
# A signal ends `wait` even though mpirun is still running. Where it has ended already, bash has kept its status.
wait "$mpirun" && status=0 || status=$?
while kill -0 "$mpirun" 2>/dev/null; do
    wait "$mpirun" && status=0 || status=$?
done
# A run that a signal has stopped does not return 0, even if mpirun does; a finished run does.
if [ "$status" -ne 0 ] && [ "$stopped" -ne 0 ]; then status=$stopped; fi
exit "$status"
