"""From configuration to a run: `RunConfig`, `build_trainer`."""

from megatron_rl.run.build import build_trainer
from megatron_rl.run.config import RunConfig

__all__ = ["RunConfig", "build_trainer"]
