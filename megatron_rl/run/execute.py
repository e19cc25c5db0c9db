"""Running a configuration from start to end, and leaving process group and disk behind cleanly."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_rl.run.build import build_trainer
from megatron_rl.run.config import RunConfig


def execute(config: RunConfig) -> dict[str, float]:
    """Train as ``config`` says; returns the newest metrics.

    A run that fails before its first step is complete takes the output folder that it made away again; one that fails
    later leaves its metrics and checkpoints.
    """
    output_dir = Path(config.trainer.output_dir)
    is_new = not output_dir.exists()
    trainer = None
    try:
        trainer = build_trainer(config)
        metrics = trainer.train()
    except BaseException:
        # Only rank 0 writes there before the first checkpoint.
        if is_new and (trainer is None or trainer.step == 0) and current_rank() == 0:
            shutil.rmtree(output_dir, ignore_errors=True)
        raise
    dist.destroy_process_group()
    return metrics


def current_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
