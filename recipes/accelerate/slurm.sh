#!/usr/bin/env bash
# Several machines under SLURM: sbatch recipes/accelerate/slurm.sh recipes/tinystory.yaml [--section.key=value ...]
# Ten minutes before its time limit the job receives SIGUSR1: the run saves and exits, and the job requeues itself.
#SBATCH --job-name=cleangpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store after each restart, see cleangpt/training/launch.py

# torchrun forwards SIGTERM to the training processes, but not SIGUSR1.
stop() { touch "stopped-$SLURM_JOB_ID"; scancel --signal=TERM "$SLURM_JOB_ID"; }
trap stop USR1

srun .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=gpu --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID" train.py "$@" &
wait $!  # returns early when the signal arrives
wait

if [[ -e "stopped-$SLURM_JOB_ID" ]]; then
    rm "stopped-$SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
