#!/usr/bin/env bash
# Slurm: one launcher on each node, with eight GPUs. Submit from the repository's root:
#   sbatch launch/slurm.sh --config configs/toy.yaml run_dir=runs/toy
# Two minutes before the time limit, or when the job is preempted, Slurm sends USR1 to this script (only to the batch
# shell, because USR1 would kill accelerate's launcher). The script asks the run to save and stop, and puts the job back
# into the queue. The next start continues from that checkpoint.
# The CPUs of a node are those of eight training processes with eight loader workers each (data.num_workers). Without
# --cpus-per-task, Slurm gives a single CPU to all of them.
#SBATCH --job-name=slotscops
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=72
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
gpus_per_node=${SLURM_GPUS_ON_NODE:-8}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export gpus_per_node head_node
# Since Slurm 22.05, srun does not take this from the job by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

stop_and_requeue() {
  trap '' USR1
  echo "$0: asked to stop: saving a checkpoint and requeuing the job"
  scancel --signal=TERM "$SLURM_JOB_ID" # the steps of the job, not this script
  wait "$run" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap stop_and_requeue USR1

srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --multi_gpu --mixed_precision bf16 --dynamo_backend no \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus_per_node))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$head_node" --main_process_port "${MASTER_PORT:-29500}" \
    launch/train.py "$@"' launch "$@" &
run=$!
wait "$run"
