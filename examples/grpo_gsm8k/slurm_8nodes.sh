#!/usr/bin/env bash
# Eight nodes of 8 GPUs. Usage: sbatch slurm_8nodes.sh MODEL TRAIN.jsonl TEST.jsonl [key=value ...]
# TP4 within a node, PP2 across two, eight data-parallel replicas. Paths must be the same on all nodes.
#SBATCH --job-name=grpo_gsm8k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
model=$1 train=$2 test=$3
shift 3
cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the project folder}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m megatron_rl train examples/grpo_gsm8k/config.yaml \
    "model=$model" "data.path=$train" "evaluation.data.path=$test" \
    parallel.tp=4 parallel.pp=2 actor.rollout.tp=4 prompts_per_step=512 "$@"
