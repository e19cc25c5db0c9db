"""Reward functions that fail, for tests of what is said then."""

from __future__ import annotations

import os


def even(sample) -> float:
    return float(len(sample.response_ids) % 2)


def raising(sample) -> float:
    raise KeyError("no such entry")


def not_a_number(sample) -> float:
    return float("nan")


def raising_on_rank_one(sample) -> float:
    return 1 / 0 if os.environ["RANK"] == "1" else even(sample)
