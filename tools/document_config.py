"""Writes docs/configuration.md from the configuration classes: their fields, types, defaults and docstrings.

python tools/document_config.py      # after adding or changing a field; a test compares the file
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import megatron_rl  # noqa: F401  installs the CPU face
from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.config import ConfigRecord
from megatron_rl.rewards import REWARDS
from megatron_rl.run import RunConfig
from megatron_rl.tracking import TRACKERS

FAMILIES: dict[str, Any] = {
    "Algorithms: the fields of `algorithm`": ALGORITHMS,
    "Rewards: `rewards[].options`": REWARDS,
    "Trackers: `tracking.options.NAME`": TRACKERS,
}
TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

<!-- Written by tools/document_config.py from the configuration classes. Change a docstring there, then run it. -->

`megatron-rl train FILE.yaml section.key=value ...` reads one YAML file and puts the overrides on top of it. A list in
an override is written as YAML: `"tracking.trackers=[console, mlflow]"`. Values may refer to one another:
`${trainer.output_dir}/data.jsonl`. `--check` prints the whole configuration with its defaults and stops. An unknown
key is an error that names the nearest known one.
"""


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(document())


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION, section("A run", RunConfig, RunConfig.model_fields)]
    shown: dict[type[ConfigRecord], str] = {}
    for key, record in nested("", RunConfig):
        parts.append(run_section(key, record, shown))
        shown.setdefault(record, key)
    for heading, registry in FAMILIES.items():
        names = ", ".join(f"`{name}`" for name in registry)
        parts.append(f"## {heading}\n\nNames: {names}.\n")
        parts += [section(title, record, own_fields(record)) for title, record in family(registry)]
    return "\n".join(parts)


def run_section(key: str, record: type[ConfigRecord], shown: dict[type[ConfigRecord], str]) -> str:
    """One section of the run; what another section has already shown is referred to."""
    if record in shown:
        return f"### `{key}`\n\nAs [`{shown[record]}`](#{shown[record].replace('.', '').replace('[]', '')}).\n"
    known = next((base for base in record.__mro__[1:] if base in shown), None)
    if known is None:
        return section(f"`{key}`", record, record.model_fields)
    return section(f"`{key}`, beside the keys of `{shown[known]}`", record, own_fields(record))


def family(registry: Any) -> Iterator[tuple[str, type[ConfigRecord]]]:
    """Every Config class of a registry's entries, bases first, each once and only where it adds or changes fields."""
    seen: set[type] = set()
    for entry in (registry[name] for name in registry):
        for record in reversed(entry.Config.__mro__):
            if record in seen or not own_fields(record):
                continue
            seen.add(record)
            bases = [f"`{base.__qualname__}`" for base in record.__bases__ if own_fields(base)]
            yield f"`{record.__qualname__}`" + (f", beside the keys of {', '.join(bases)}" if bases else ""), record
            for key, inner in nested("", record):
                if inner not in seen:
                    seen.add(inner)
                    yield f"`{key}` of `{record.__qualname__}`", inner


def nested(prefix: str, record: type[ConfigRecord]) -> Iterator[tuple[str, type[ConfigRecord]]]:
    """Records inside ``record``, by the dotted key they stand at; lists of records as ``key[]``."""
    for name, field in record.model_fields.items():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, ConfigRecord):
                key = f"{prefix}{name}" + ("[]" if typing.get_origin(field.annotation) is tuple else "")
                yield key, inner
                if not key.startswith("critic"):  # its records are those of actor
                    yield from nested(f"{key}.", inner)


def own_fields(record: type) -> dict[str, FieldInfo]:
    """Fields that ``record`` itself declares."""
    if not issubclass(record, ConfigRecord) or record is ConfigRecord:
        return {}
    own = vars(record).get("__annotations__", ())
    return {name: field for name, field in record.model_fields.items() if name in own}


def section(title: str, record: type[ConfigRecord], fields: dict[str, FieldInfo]) -> str:
    """A heading, the record's one-line docstring and a table of its fields."""
    about = (record.__doc__ or "").strip().splitlines()[0]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {type_name(field.annotation)} | {default(field)} | {cell(field.description or '')} |"
        for name, field in fields.items()
    ]
    return f"### {title}\n\n{about}\n\n" + "\n".join(rows) + "\n"


def type_name(kind: Any) -> str:
    """A type as YAML's writer thinks of it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " \\| ".join(map(str, arguments))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " \\| ".join("null" if part is type(None) else type_name(part) for part in arguments)
    if typing.get_origin(kind) is typing.Annotated:
        return type_name(arguments[0])
    if typing.get_origin(kind) is tuple:
        return f"list of {type_name(arguments[0])}"
    if typing.get_origin(kind) is dict:
        return "mapping"
    if isinstance(kind, type) and issubclass(kind, ConfigRecord):
        return "section"
    return str(getattr(kind, "__name__", kind))


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, ConfigRecord):
        return ""
    assert value is not PydanticUndefined
    shown = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return f"`{shown or (list(value) if isinstance(value, tuple) else value)!s}`" if value != "" else '`""`'


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
