"""`ConfigRecord`: the base of every configuration class, owned by the class it configures (`GRPO.Config`).

Frozen, typed, and strict: an unknown key or a bad value is an error that names the key, the value and what was
expected. One docstring line per field says its meaning and unit.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what was given, what was expected and what to do."""


class ConfigRecord(BaseModel):
    """Frozen, strict configuration record. Nested records are fields of this type.

    Raises:
        ConfigError: from `parse`, on unknown keys, missing keys or values of the wrong type.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Build the record from plain data; ``where`` names its source in error messages."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, where)) from None


def _explain(record: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = ".".join(path) or "(whole record)"
        if problem["type"] == "extra_forbidden":
            known = known_keys(record)
            hit = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            siblings = [k for k in known if k.split(".")[:-1] == path[:-1]]
            hint = f"did you mean {hit[0]!r}?" if hit else f"known here: {', '.join(sorted(siblings))}"
            lines.append(f"unknown key {key!r}; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key!r} is required but not given")
        else:
            lines.append(f"{key} = {problem.get('input')!r}: {problem['msg']}")
    return f"{where}: " + "; ".join(lines)


def known_keys(record: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that ``record`` accepts, nested records included."""
    keys = []
    for name, field in record.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += known_keys(candidate, f"{prefix}{name}.")
    return keys
