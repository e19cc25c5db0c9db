"""Actor, Critic, Reference and RewardModel: roles around Megatron-Core model chunks.

They are loaded on first use: losses and algorithms import `workers.loss` without needing Megatron-Core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.workers.actor import Actor
    from megatron_rl.workers.critic import Critic
    from megatron_rl.workers.reference import Reference
    from megatron_rl.workers.reward_model import RewardModel

_HOMES = {"Actor": "actor", "Critic": "critic", "Reference": "reference", "RewardModel": "reward_model"}

__all__ = ["Actor", "Critic", "Reference", "RewardModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
