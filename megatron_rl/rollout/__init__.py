"""Engines that generate completions: one interface, a local engine for laptops and tests, and SGLang servers."""

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
from megatron_rl.rollout.module.module_engine import ModuleEngine
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.rollout.sglang.sglang_engine import SGLangEngine

__all__ = [
    "ENGINES",
    "Completion",
    "LocalEngine",
    "ModuleEngine",
    "RolloutEngine",
    "RolloutPlacement",
    "SGLangEngine",
    "SamplingParams",
    "ServersLostError",
    "WeightCheck",
    "sample_seed",
]
