#!/usr/bin/env bash
# One config on GPU nodes under Slurm, one process a node; a job that is requeued resumes.
#
#   sbatch --nodes=2 experiments/launch/slurm.sh configs/qwen3_1p7b_math.py [--config.train.steps=200 …]
#
# WORKDIR has to lie where all nodes see it. VENV is an environment with this project and its extra cuda.
#SBATCH --job-name=omniopd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

config=${1:?name a config file, for example configs/qwen3_1p7b_math.py}
shift
workdir=${WORKDIR:-runs/$(basename "$config" .py)}
if [[ -n ${VENV:-} ]]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi

# jax finds the coordinator, the number of processes and this one's number in Slurm's own variables.
status=0
srun --kill-on-bad-exit=1 python -m experiments.train --config="$config" --workdir="$workdir" "$@" || status=$?
if [[ $status == 143 ]]; then # stopped with a checkpoint: back into the queue
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
