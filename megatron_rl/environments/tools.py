"""`Tool`: a plain Python function that a model may call; its types and docstring become a JSON schema.

def add(a: int, b: int = 0) -> int:
    '''Adds two whole numbers.

    Args:
        a: the first number
        b: the second number
    '''
    return a + b

Tool.of(add).schema  # what a chat template's ``tools`` gets
Tool.of(add)({"a": 1, "b": "2"})  # 3: arguments are checked and converted by their types
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from megatron_rl.config import ConfigError

_ARGUMENTS = re.compile(r"\n\s*(?:Args|Arguments|Parameters):\s*\n(.*?)(?:\n\s*\n|\n\s*\w+:\s*\n|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


@dataclass(frozen=True, slots=True)
class Tool:
    """Made by `Tool.of`."""

    name: str
    function: Callable[..., Any]
    arguments: type[BaseModel]  # checks and converts
    schema: dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A tool from a function with typed parameters and a docstring.

        Raises:
            ConfigError: a parameter without a type or without a name, or no docstring.
        """
        name = str(getattr(function, "__name__", type(function).__name__))
        text = inspect.getdoc(function)
        if not text:
            raise ConfigError(f"tool {name!r} has no docstring: the model reads it, so say there what the tool does")
        described = _described_arguments(text)
        arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **_fields(name, function, described))  # type: ignore[call-overload]  # fields by name
        parameters = _without_titles(arguments.model_json_schema())
        del parameters["additionalProperties"]
        parameters.setdefault("properties", {})
        summary = _ARGUMENTS.split(text)[0]
        summary = " ".join(re.split(r"\n\s*Returns:", summary)[0].split())
        schema = {"name": name, "description": summary, "parameters": parameters}
        return cls(name, function, arguments, {"type": "function", "function": schema})

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function.

        Raises:
            ValueError: the arguments do not fit its types; the message is for the model.
        """
        try:
            checked = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            raise ValueError("; ".join(problems)) from None
        return self.function(**{name: getattr(checked, name) for name in type(checked).model_fields})


def _fields(name: str, function: Callable[..., Any], described: Mapping[str, str]) -> dict[str, Any]:
    types = typing.get_type_hints(function)
    fields = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"tool {name!r}: its parameter {parameter} cannot be given by name")
        if parameter.name not in types:
            raise ConfigError(f"tool {name!r}: its parameter {parameter.name!r} has no type: add one, as in x: int")
        default = ... if parameter.default is parameter.empty else parameter.default
        text = described.get(parameter.name)
        fields[parameter.name] = (types[parameter.name], Field(default, description=text))
    return fields


def _described_arguments(text: str) -> dict[str, str]:
    """The section Args of a docstring in Google's style: name -> description."""
    section = _ARGUMENTS.search(text)
    found: dict[str, str] = {}
    last = ""
    for line in section[1].splitlines() if section else ():
        entry = _ARGUMENT.fullmatch(line.strip())
        if entry is not None:
            last, found[entry[1]] = entry[1], entry[2]
        elif last:
            found[last] += " " + line.strip()
    return found


def _without_titles(schema: Any, names: bool = False) -> Any:
    """A schema without pydantic's titles; ``names``: its keys are names of properties."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if names or key != "title"}
    return {
        key: _without_titles(value, names=key in ("properties", "$defs") and not names) for key, value in kept.items()
    }
