"""Reinforcement learning for the Megatron-Core job you already run.

Importing this package lets Megatron-Core run on a machine without an accelerator (`megatron_rl.devices`), so import it
before ``megatron.core``. The public names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_rl.devices import install_cpu_face

if TYPE_CHECKING:
    from megatron_rl.algorithms import DPO, GRPO, KTO, PPO, BaseAlgorithm
    from megatron_rl.run import DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer, RewardTrainer, SFTTrainer, Trainer
    from megatron_rl.trainer import Callback
    from megatron_rl.workers import Actor, Critic, Reference, RewardModel

__version__ = "0.1.0"

_HOMES = {
    "megatron_rl.workers": ("Actor", "Critic", "Reference", "RewardModel"),
    "megatron_rl.algorithms": ("PPO", "GRPO", "DPO", "KTO", "BaseAlgorithm"),
    "megatron_rl.trainer": ("Callback",),
    "megatron_rl.run": ("DPOTrainer", "KTOTrainer", "PPOTrainer", "GRPOTrainer", "RewardTrainer", "SFTTrainer"),
    "megatron_rl.run.training_run": ("Trainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "PPO",
    "Actor",
    "BaseAlgorithm",
    "Callback",
    "Critic",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "PPOTrainer",
    "Reference",
    "RewardModel",
    "RewardTrainer",
    "SFTTrainer",
    "Trainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_cpu_face()
