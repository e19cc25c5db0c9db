"""A reward that cannot be had for some samples, others on each data-parallel rank; see `test_dropped_samples.py`."""

from __future__ import annotations

from megatron_rl.rewards import NoReward


def sometimes(sample) -> float | NoReward:
    if sample.prompt.index % 4 == 0 or sum(sample.response_ids) % 5 == 0:
        return NoReward("the judge was asleep")
    return float(sum(sample.response_ids) % 7)
