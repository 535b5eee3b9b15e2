#!/usr/bin/env bash
# Slurm: one launcher a node, eight GPUs each. Submit from the repository's root:
#   sbatch launch/slurm.sh --config configs/toy.yaml run_dir=runs/toy
# A job that is requeued goes on from its newest checkpoint.
#SBATCH --job-name=slotscops
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
gpus_per_node=${SLURM_GPUS_ON_NODE:-8}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export gpus_per_node head_node
srun --kill-on-bad-exit=1 bash -c '
  accelerate launch --multi_gpu --mixed_precision bf16 --dynamo_backend no \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus_per_node))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$head_node" --main_process_port 29500 \
    launch/train.py "$@"' launch "$@"
