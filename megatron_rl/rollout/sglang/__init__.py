"""Rollouts on real SGLang servers, started here or attached to, over HTTP only; SGLang itself is never imported."""

from megatron_rl.rollout.sglang import direct, full_deliveries  # noqa: F401  each registers its deliveries
