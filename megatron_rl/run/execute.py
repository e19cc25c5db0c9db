"""Running a configuration from start to end, and leaving process group and disk behind cleanly."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_rl.run.build import build_trainer
from megatron_rl.run.check import check_writable
from megatron_rl.run.run_config import RunConfig


def execute(config: RunConfig) -> dict[str, float]:
    """Train as ``config`` says; returns the newest metrics.

    A run that fails before its first step is complete takes the output folder that it made away again; one that fails
    later leaves its metrics and checkpoints.
    """
    check_writable(Path(config.trainer.output_dir))
    metrics = build_trainer(config).train()
    dist.destroy_process_group()
    return metrics
