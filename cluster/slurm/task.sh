#!/usr/bin/env bash
# Runs a process of a Slurm step as a rank: passes Slurm's numbers under the names that torch.distributed reads.
# Run by srun in train.sbatch, which sets MASTER_ADDR and MASTER_PORT: task.sh COMMAND [ARGUMENT ...]
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
on_node=() # number of tasks on each node, from "8(x3),4"
tasks=${SLURM_STEP_TASKS_PER_NODE:-$SLURM_TASKS_PER_NODE}
for part in ${tasks//,/ }; do
    nodes=1
    if [[ $part == *"(x"* ]]; then nodes=${part#*(x} nodes=${nodes%)}; fi
    for ((i = 0; i < nodes; i++)); do on_node+=("${part%%(*}"); done
done
export LOCAL_WORLD_SIZE=${on_node[$SLURM_NODEID]}
exec "$@"
