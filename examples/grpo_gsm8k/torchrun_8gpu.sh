#!/usr/bin/env bash
# One node of 8 GPUs. Usage: torchrun_8gpu.sh MODEL TRAIN.jsonl TEST.jsonl [key=value ...]
# TP2 within the node, four data-parallel replicas; a rollout engine of TP2 for each.
set -euo pipefail
model=$1 train=$2 test=$3
shift 3
cd "$(dirname "$0")/../.."

exec torchrun --standalone --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    -m megatron_rl train examples/grpo_gsm8k/config.yaml \
    "model=$model" "data.path=$train" "evaluation.data.path=$test" \
    parallel.tp=2 actor.rollout.tp=2 "$@"
