"""Engines that generate completions: one face, a local engine for laptops and tests, and servers behind HTTP."""

from __future__ import annotations

from megatron_rl.rollout.base import (
    ENGINES,
    Completion,
    RolloutEngine,
    SamplingParams,
    ServersLostError,
    WeightCheck,
    sample_seed,
)
from megatron_rl.rollout.local.local_engine import LocalEngine
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.rollout.sglang.sglang_engine import SGLangEngine

__all__ = [
    "ENGINES",
    "Completion",
    "LocalEngine",
    "RolloutEngine",
    "RolloutPlacement",
    "SGLangEngine",
    "SamplingParams",
    "ServersLostError",
    "WeightCheck",
    "sample_seed",
]
