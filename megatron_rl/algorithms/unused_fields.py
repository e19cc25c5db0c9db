"""Refusing fields of a Config that the algorithm would ignore."""

from __future__ import annotations

from megatron_rl.config import ConfigRecord


def refuse_unused(record: ConfigRecord, owner: str, **reasons: str) -> None:
    """Raises ValueError where one of the fields named is not at its default: ``owner`` would ignore it.

    Args:
        owner: the algorithm or option, for the message.
        reasons: field -> what to do instead, or why the field has no meaning here.
    """
    values = dict(record)
    for name, reason in reasons.items():
        if values[name] != type(record).model_fields[name].default:
            raise ValueError(f"{owner} does not use {name}={values[name]!r}: {reason}")
