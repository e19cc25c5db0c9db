"""`ConfigRecord`: the base of every configuration class, owned by the class it configures (`GRPO.Config`).

Frozen, typed, and strict: an unknown key or a bad value is an error that names the key, the value and what was
expected, however the record is made. One docstring line per field says its meaning and unit; every number has a range
(`config.ranges`).
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic._internal._model_construction import ModelMetaclass  # no public name

from megatron_rl.config.credentials import masked

_UNION_MEMBER = re.compile(r"(literal|tuple|list|dict)\[|(bool|int|float|str)$")  # how pydantic names one in a place
MAX_SHOWN = 120  # characters of a value in a message


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what was given, what was expected and what to do."""


class _RecordType(ModelMetaclass):
    """Makes ``Record(field=value)`` raise what `ConfigRecord.parse` raises. An ``__init__`` of our own would be called
    for nested records too, and lose where in the whole a mistake is."""

    def __call__(self, *arguments: Any, **values: Any) -> Any:
        try:
            return super().__call__(*arguments, **values)
        except ValidationError as error:
            raise ConfigError(_explain(self, error, self.__qualname__)) from None  # type: ignore[arg-type]


class ConfigRecord(BaseModel, metaclass=_RecordType):
    """Frozen, strict configuration record. Nested records are fields of this type.

    Raises:
        ConfigError: on unknown keys, missing keys, and values of the wrong type or out of range.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Build the record from plain data; ``where`` names its source in error messages."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, where)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed; unlike pydantic's, it is checked as any new record is."""
        made = type(self).parse(dict(self) | dict(update or {}), type(self).__qualname__)
        object.__setattr__(made, "__pydantic_fields_set__", self.model_fields_set | set(update or {}))
        return made.__deepcopy__() if deep else made

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what no field of any record can mean."""
        assert info.field_name is not None  # this is no whole-record validator
        field = cls.model_fields[info.field_name]
        kinds = _kinds(cls, info.field_name)
        if not any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            _refuse_unusable(value)  # a nested record looks at its own fields, and names them
        if isinstance(value, str) and not value.strip() and field.default != "":
            raise ValueError("an empty text says nothing: give a value, or leave the key out")
        if isinstance(value, (list, tuple)) and "" in [item for item in value if isinstance(item, str)]:
            raise ValueError("one of its texts is empty: leave it out")
        if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, object, Any}:
            raise ValueError("expected a number, not true or false")
        return value


def _refuse_unusable(value: Any) -> None:
    """Raise ValueError for numbers and texts that nothing can be done with, at any depth of plain data."""
    if isinstance(value, str):
        if "\0" in value or not _encodes(value):
            raise ValueError("expected plain text: this has a character that cannot be written as UTF-8, or a NUL")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"a whole number of {value.bit_length()} bits: expected one that fits into 64")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_unusable(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_unusable(name)
            _refuse_unusable(item)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def _kinds(record: type[BaseModel], field: str) -> frozenset[Any]:
    """All types that the annotation of a field names."""
    return frozenset(_types(record.model_fields[field].annotation))


def _types(annotation: Any) -> Iterator[Any]:
    """The annotation and everything that a union in it allows."""
    yield annotation
    if typing.get_origin(annotation) not in (dict, list, tuple):
        for part in typing.get_args(annotation):
            yield from _types(part)


def _explain(record: type[BaseModel], error: ValidationError, where: str) -> str:
    lines, wrong = [], dict[str, list[str]]()  # key and value -> what was expected; each kind of a union says its own
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"] if not _UNION_MEMBER.match(str(part))]
        key = ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = known_keys(record)
            hit = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            siblings = [k for k in known if k.split(".")[:-1] == path[:-1]]
            hint = f"did you mean {hit[0]!r}?" if hit else f"known here: {', '.join(sorted(siblings))}"
            lines.append(f"unknown key {key!r}; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key!r} is required but not given")
        else:
            given = masked(f"{key} = {shown(problem.get('input'))}: ") if key else ""
            wrong.setdefault(given, []).append(_plainly(problem["msg"]))
    lines += [given + ", or ".join(messages) for given, messages in wrong.items()]
    return f"{where}: " + "; ".join(lines)


def _plainly(message: str) -> str:
    """Pydantic's message in this project's words, on one line."""
    message = " ".join(message.removeprefix("Value error, ").split())
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    message = message.replace("greater than", "more than").replace("Input should be a valid tuple", "expected a list")
    return re.sub(r"^Input should be (?=at |more |less )", "expected ", message)


def shown(value: Any) -> str:
    """``value`` on one line of bounded length, for error messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
        text = f"<{type(value).__name__}>"
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def known_keys(record: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that ``record`` accepts, nested records included."""
    keys = []
    for name, field in record.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += known_keys(candidate, f"{prefix}{name}.")
    return keys
