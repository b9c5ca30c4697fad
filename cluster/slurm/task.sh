#!/usr/bin/env bash
# Runs a process of a Slurm step as a rank: passes Slurm's numbers under the names that torch.distributed reads.
# Run by srun in train.sbatch, which sets MASTER_ADDR and MASTER_PORT: task.sh COMMAND [ARGUMENT ...]
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
