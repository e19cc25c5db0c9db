"""The refusal of settings that an algorithm would ignore; ranges of settings are in `config.ranges`."""

from __future__ import annotations

from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import Finite, FlipProbability, Fraction, NonNegative, OpenFraction, Positive

__all__ = ["Finite", "FlipProbability", "Fraction", "NonNegative", "OpenFraction", "Positive", "refuse_unused"]


def refuse_unused(record: ConfigRecord, owner: str, **reasons: str) -> None:
    """Raises ValueError where one of the fields named is not at its default: ``owner`` would ignore it.

    Args:
        owner: whose formula has no such setting.
        reasons: field -> what to do instead, or why there is no such thing.
    """
    values = dict(record)
    for name, reason in reasons.items():
        if values[name] != type(record).model_fields[name].default:
            raise ValueError(f"{owner} does not use {name}={values[name]!r}: {reason}")
