#!/usr/bin/env bash
# Several machines under SLURM, from the project's root (sbatch's own options override those below):
#   sbatch [--nodes=4] recipes/accelerate/slurm.sh recipes/tinystory.yaml [--section.key=value ...]
# Ten minutes before its time limit the job receives SIGUSR1: the run saves and exits, and the job requeues itself.
# Each machine starts a process per GPU. Without GPUs (sbatch --gpus-per-node=0 --cpus-per-task=CORES) it starts one
# per core; PET_NPROC_PER_NODE=1 before sbatch makes that one process with a thread per core.
# run.output_dir must be on a disk that all machines see.
#SBATCH --job-name=cleangpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 10000))"  # a port of its own, should jobs share a machine
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over from sbatch
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store after each restart, see cleangpt/training/launch.py

# torchrun forwards SIGTERM to the training processes, but not SIGUSR1.
stopping=false
stop() {
    stopping=true
    scancel --signal=TERM "$SLURM_JOB_ID"
    echo "The time is nearly up: the run saves, and goes on when the job starts again."
}
trap stop USR1

# Who is the first machine, and under which name the others find each, is known here; torchrun's guess can be wrong.
# shellcheck disable=SC2016  # expanded on each machine
srun bash -c 'exec .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${PET_NPROC_PER_NODE:-auto}" \
    --max_restarts=3 --shutdown_timeout=300 --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$RENDEZVOUS" --rdzv_conf="is_host=$((SLURM_NODEID == 0))" --local_addr="$SLURMD_NODENAME" \
    train.py "$@"' torchrun "$@" &
run=$!
wait "$run"
code=$?
if $stopping; then  # `wait` returned early
    wait "$run"
    code=$?
    ((code == 0)) || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
