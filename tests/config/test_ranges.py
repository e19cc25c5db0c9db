"""Every number of every configuration class has a range, and what no field can mean is refused in one line."""

from __future__ import annotations

import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Le, Lt

import megatron_rl
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.ranges import NonNegative
from megatron_rl.rollout.base import SamplingParams
from megatron_rl.workers.actor_config import ActorConfig

PASSED_ON = {("ServerConfig", "args")}  # arguments of another program, whose ranges are its own
NOWHERE = {
    "a nan": math.nan,
    "an infinity": math.inf,
    "a number of 400 digits": 10**399,
    "a number of 5,000 digits": 10**4999,
    "a lone surrogate": "\ud800",
    "a NUL": "a\0b",
    "an object": object(),
}


def records() -> list[type[ConfigRecord]]:
    for module in pkgutil.walk_packages(megatron_rl.__path__, "megatron_rl."):
        if not any(part in module.name for part in ("triton", "cpu_shim", "__main__", "verifier_program")):
            importlib.import_module(module.name)

    def below(kind: type[ConfigRecord]) -> Iterator[type[ConfigRecord]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    found = {kind for kind in below(ConfigRecord) if kind.__module__.startswith("megatron_rl.")}
    return sorted(found, key=lambda kind: (kind.__module__, kind.__qualname__))


RECORDS = records()


def leaves(annotation: Any, constraints: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types of an annotation, each with the constraints that apply to it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        extra = [c for part in arguments[1:] for c in getattr(part, "metadata", [part])]
        yield from leaves(arguments[0], (*constraints, *extra))
    elif origin in (typing.Union, types.UnionType):
        for part in arguments:
            yield from leaves(part, constraints)
    elif origin in (tuple, list, dict):
        for part in arguments:
            yield from leaves(part, ())
    else:
        yield annotation, constraints


def fields() -> Iterator[tuple[type[ConfigRecord], str]]:
    for record in RECORDS:
        for name in record.model_fields:
            yield record, name


def bounds(record: type[ConfigRecord], name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    field = record.model_fields[name]
    return [leaf for leaf in leaves(field.annotation, tuple(field.metadata)) if leaf[0] in (int, float)]


def unbounded(kinds: typing.Iterable[tuple[type[ConfigRecord], str]]) -> list[str]:
    return [
        f"{record.__module__}.{record.__qualname__}.{name}"
        for record, name in kinds
        if (record.__qualname__, name) not in PASSED_ON
        if any(not any(isinstance(c, (Ge, Gt)) for c in constraints) for _, constraints in bounds(record, name))
    ]


def test_every_number_has_a_least_value():
    assert len(RECORDS) > 40
    assert unbounded(fields()) == []


def test_the_walk_finds_a_number_without_a_range():
    class Careless(ConfigRecord):
        steps: int = 1
        rates: tuple[float, ...] = ()
        good: dict[str, NonNegative] = {}  # noqa: RUF012

    found = unbounded((Careless, name) for name in Careless.model_fields)
    assert [name.rpartition(".")[2] for name in found] == ["steps", "rates"]


def refuse(record: type[ConfigRecord], name: str, value: Any) -> str:
    """The one line with which ``record(name=value)`` is refused."""
    with pytest.raises(ConfigError) as caught:
        record(**{name: value})
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize("given", NOWHERE)
def test_no_field_takes(given):
    open_fields = [(r, n) for r, n in fields() if given != "an object" or bounds(r, n)]
    for record, name in open_fields:
        refuse(record, name, NOWHERE[given])


def test_numbers_out_of_their_range_and_truth_values_are_refused():
    tried = 0
    for record, name in fields():
        field = record.model_fields[name]
        if field.annotation not in (int, float):
            continue
        for constraint in field.metadata:
            wrong = [constraint.ge - 1] if isinstance(constraint, Ge) else []
            wrong += [constraint.gt] if isinstance(constraint, Gt) else []
            wrong += [constraint.le + 1] if isinstance(constraint, Le) and constraint.le < 2**62 else []
            wrong += [constraint.lt] if isinstance(constraint, Lt) else []
            for value in wrong:
                refuse(record, name, value)
                tried += 1
        refuse(record, name, True)
    assert tried > 100


def test_empty_texts_are_refused_where_they_are_not_the_default():
    for record, name in fields():
        field = record.model_fields[name]
        kinds = {kind for kind, _ in leaves(field.annotation, ())}
        if typing.get_origin(field.annotation) is tuple and str in kinds:
            refuse(record, name, [""])
        elif str in kinds and field.default != "" and typing.get_origin(field.annotation) is not dict:
            refuse(record, name, "")


def test_a_nested_mistake_is_named_by_its_whole_path():
    with pytest.raises(ConfigError, match=r"^ActorConfig: optimizer\.beta1 = 2: expected less than 1$"):
        ActorConfig(optimizer={"beta1": 2})


def test_a_copy_is_checked_and_remembers_what_was_set():
    settings = ActorConfig(seed=3)
    with pytest.raises(ConfigError, match="learning_rate = -1"):
        settings.optimizer.model_copy(update={"learning_rate": -1})
    copy = settings.model_copy(update={"token_budget": 7})
    assert (copy.token_budget, copy.model_fields_set) == (7, {"seed", "token_budget"})


def test_whitespace_is_a_stop_text():
    assert SamplingParams(stop=("\n", " ")).stop == ("\n", " ")
