"""The training loop, callbacks, metrics and checkpoints."""

from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.loop import TrainingLoop
from megatron_rl.trainer.trainer_config import TrainerConfig

__all__ = ["Callback", "TrainerConfig", "TrainingLoop"]
