"""From configuration, or from parts made in Python, to a run."""

from megatron_rl.run.build import build_trainer
from megatron_rl.run.evaluation import Evaluation
from megatron_rl.run.run_config import RunConfig
from megatron_rl.run.trainers import DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
from megatron_rl.run.training_run import Trainer

__all__ = [
    "DPOTrainer",
    "Evaluation",
    "GRPOTrainer",
    "KTOTrainer",
    "PPOTrainer",
    "RewardTrainer",
    "RunConfig",
    "SFTTrainer",
    "Trainer",
    "build_trainer",
]
