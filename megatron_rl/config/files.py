"""Configuration files: YAML plus dotted overrides in, a validated record out, and back to YAML beside the outputs.

    config = load_config(RunConfig, "examples/arithmetic_grpo/config.yaml", ["parallel.tp=2", "algorithm.beta=0.01"])
    save_config(config, output_dir / "config.yaml")

Values may refer to one another with OmegaConf's ``${section.key}``. Every mistake is one ConfigError that says where
it is and what would be right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config.record import ConfigError, ConfigRecord, shown

Record = TypeVar("Record", bound=ConfigRecord)


def load_config(record_type: type[Record], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Record:
    """Read ``path``, apply ``overrides`` ("section.key=value", the value in YAML), resolve references, validate.

    Raises:
        ConfigError: the file is missing or broken (file:line), an override is malformed, a reference leads nowhere, a
            key is unknown (the nearest valid one is named), missing or of the wrong type.
    """
    config = _read_yaml(Path(path))
    for override in overrides:
        _apply(config, override)
    where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{where}: {_one_line(error)}") from None
    assert isinstance(values, dict)  # _read_yaml lets only mappings through
    return record_type.parse({str(key): value for key, value in values.items()}, where=where)


def save_config(config: ConfigRecord, path: str | os.PathLike[str]) -> None:
    """Write every field, defaults included, as YAML that `load_config` reads back to an equal record.

    The file appears whole or not at all, so that a killed run leaves no half configuration behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    os.replace(partial, target)


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a BOM is passed over
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist{_siblings(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    try:
        config = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except AssertionError:  # a single number, date or the like
        raise ConfigError(
            f"{path}: the file holds one value, expected a mapping of 'section: ...' at the top"
        ) from None
    except (ValueError, RecursionError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not a configuration: {_one_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: the file holds a {_kind(config)}, expected a mapping of 'section: ...' at the top")
    return config


def _apply(config: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. parallel.tp=2")
    try:
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
        OmegaConf.update(config, key.strip(), value, merge=False)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {problem}") from None
    except (OmegaConfBaseException, AssertionError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {shown(override)} does not fit the file: {_one_line(error)}") from None


def _siblings(path: Path) -> str:
    """The YAML files that do lie in the folder meant, for the error message."""
    if not path.parent.is_dir():
        return f", nor does its folder {str(path.parent)!r}"
    found = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"; {str(path.parent)!r} has {', '.join(found) if found else 'no YAML file'}"


def _kind(value: Any) -> str:
    return "list" if OmegaConf.is_list(value) else type(value).__name__


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
