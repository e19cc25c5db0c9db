"""Ranges of settings as types, and the refusal of settings that an algorithm would ignore.

A range belongs to the type, so that a subclass which gives a field another default keeps it by naming the type again.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_rl.config import ConfigRecord

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
FlipProbability = Annotated[float, Field(ge=0.0, lt=0.5, allow_inf_nan=False)]  # of a label; at 0.5 it says nothing


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
