"""The training loop, callbacks, metrics and checkpoints."""

from megatron_rl.trainer.callbacks import Callback, StopAtReward
from megatron_rl.trainer.loop import TrainingLoop
from megatron_rl.trainer.settings import TrainerSettings

__all__ = ["Callback", "StopAtReward", "TrainerSettings", "TrainingLoop"]
