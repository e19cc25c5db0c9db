"""From configuration, or from parts made in Python, to a run."""

from megatron_rl.run.build import build_trainer
from megatron_rl.run.config import RunConfig
from megatron_rl.run.connect import connect
from megatron_rl.run.evaluation import Evaluation

__all__ = ["Evaluation", "RunConfig", "build_trainer", "connect"]
