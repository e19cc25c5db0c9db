"""Running a configuration from start to end, and leaving the process group behind cleanly."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rl.run.build import build_trainer
from megatron_rl.run.config import RunConfig


def execute(config: RunConfig) -> dict[str, float]:
    """Train as ``config`` says; returns the newest metrics."""
    trainer = build_trainer(config)
    metrics = trainer.train()
    dist.destroy_process_group()
    return metrics
