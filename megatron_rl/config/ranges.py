"""Ranges of settings as types: every number of every configuration has one.

A range belongs to the type, so that a subclass which gives a field another default keeps it by naming the type again.
Not-a-number, infinities and whole numbers of more than 64 bits are refused everywhere, by `ConfigRecord` itself.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Finite = Annotated[float, Field(ge=-1e9, le=1e9)]  # of either sign
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
FlipProbability = Annotated[float, Field(ge=0.0, lt=0.5)]  # of a label; at 0.5 it says nothing
Seed = Annotated[int, Field(ge=0, lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
