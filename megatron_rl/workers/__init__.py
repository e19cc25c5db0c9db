"""Actor, Critic, Reference and RewardModel: roles around Megatron-Core model chunks.

The names are loaded on first use, so that algorithms can import the loss records without importing Megatron-Core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.workers.actor import Actor
    from megatron_rl.workers.reference import Reference
    from megatron_rl.workers.reward_model import RewardModel

_HOME_OF = {"Actor": "actor", "Reference": "reference", "RewardModel": "reward_model"}

__all__ = ["Actor", "Reference", "RewardModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
