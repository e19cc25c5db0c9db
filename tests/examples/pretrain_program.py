"""Run with 4 ranks by test_arithmetic: train a little at TP2 x PP2, save, and load in other layouts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "arithmetic_grpo"))

import pretrain
from arithmetic import split_sums
from megatron.core import parallel_state


def held_out_loss(model: list, rows: torch.Tensor) -> float:
    losses = pretrain.get_forward_backward_func()(
        forward_step_func=pretrain.forward_step,
        data_iterator=iter([rows]),
        model=model,
        num_microbatches=1,
        seq_length=pretrain.LENGTH - 1,
        micro_batch_size=len(rows),
        forward_only=True,
    )
    loss = losses[0]["loss"].reshape(1) if losses else torch.zeros(1)
    dist.broadcast(loss, dist.get_world_size() - 1)
    return loss.item()


def main() -> None:
    checkpoint = Path(sys.argv[1])
    pretrain.initialize(2, 2, seed=1)
    rows = pretrain.encode(split_sums()[1])
    model = pretrain.build_model()
    optimizer = pretrain.build_optimizer(model, 2e-3)
    before = held_out_loss(model, rows)
    steps = pretrain.train(model, optimizer, argparse.Namespace(steps=5, micro_batch=8, seed=1, stop_at=1.0))
    after = held_out_loss(model, rows)
    pretrain.save_checkpoint(checkpoint, model, optimizer, steps)
    found = {"before": before, "after": after}
    for tensor_parallel, pipeline_parallel in ((1, 1), (2, 1), (1, 2)):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
        other = pretrain.build_model()
        unloaded = held_out_loss(other, rows)
        pretrain.load_checkpoint(checkpoint, other)
        found[f"tp{tensor_parallel}pp{pipeline_parallel}"] = (unloaded, held_out_loss(other, rows))
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
