"""Rollout ranks from Python, run on 2 ranks by test_rollout_ranks: FOLDER holds a model and prompts.

Prints the flow, and on each rank what `Trainer.train` returned.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from small_run import digits
from transformers import AutoTokenizer

from megatron_rl import GRPO, Actor, RewardModel
from megatron_rl.data import PromptDataset, PromptLoader
from megatron_rl.parallel import ParallelSizes
from megatron_rl.run import Trainer
from megatron_rl.tracking import TrackerGroup

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = {"optimizer": {"learning_rate": 3e-3}, "sampling": {"max_tokens": 5}}
    actor = Actor(str(folder / "model"), tokenizer, parallel=ParallelSizes(rollout_ranks=1), config=config)
    data = PromptDataset.Config(path=str(folder / "train.jsonl"))
    loader = PromptLoader(PromptDataset(None, tokenizer, data), 8, actor)
    reward, grpo = RewardModel(digits), GRPO(actor=actor)
    flow = actor.sample(n=4, lag=1) >> reward.score() >> grpo.update()
    if os.environ["RANK"] == "0":
        print(flow)
    tracking = TrackerGroup.Config(trackers=("jsonl",))
    settings = {"num_steps": 3, "output_dir": str(folder / "python"), "export": False, "save_at_end": False}
    metrics = Trainer(flow, loader, tracking=tracking, **settings).train()
    print("returned:", json.dumps(metrics, sort_keys=True))
    saved = actor.save_pretrained(folder / "saved")  # on rollout ranks nothing is written
    dist.barrier()
    assert actor.context.split is not None
    assert actor.context.split.on_rollout or (saved / "config.json").is_file()
    dist.destroy_process_group()
