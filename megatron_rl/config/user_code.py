"""User code named in configuration: "package.module:name" or "path/to/file.py:name" -> the object.

Used for rewards, algorithms and anything else that a YAML file or the command line names.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rl.config.record import ConfigError

USER_CODE = "python:"  # stands before user code where registered names are possible, too


def load_user_object(spec: str) -> Any:
    """The object that ``spec`` names, with or without "python:"; file paths are relative to the working directory.

    Raises:
        ConfigError: the spec is malformed, the module or file is absent or fails on import, or the name is not in it.
    """
    spec = spec.removeprefix(USER_CODE)
    module_name, colon, name = spec.rpartition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{spec!r} does not name user code: expected 'package.module:name' or 'path/to/file.py:name'")
    module = _load_file(spec, Path(module_name)) if module_name.endswith(".py") else _load_module(spec, module_name)
    if not hasattr(module, name):
        known = [n for n in vars(module) if not n.startswith("_")]
        hit = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {hit[0]!r}?" if hit else ""
        raise ConfigError(f"{spec!r}: {module_name} has no {name!r}.{hint}")
    return getattr(module, name)


def _load_module(spec: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{spec!r}: there is no module {error.name!r} on the Python path; install it, set PYTHONPATH, or name "
                "the file itself: path/to/file.py:name"
            ) from None
        raise ConfigError(f"{spec!r}: importing {module_name} failed: {error}") from error
    except Exception as error:
        raise ConfigError(f"{spec!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{spec!r}: file {str(path)!r} does not exist in {Path.cwd()}")
    # A name of its own keeps a user's "math.py" from shadowing anything; the same file is loaded once.
    module_name = "megatron_rl_user_" + "_".join(path.resolve().with_suffix("").parts[1:])
    if module_name in sys.modules:
        return sys.modules[module_name]
    file_spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert file_spec is not None  # a .py file always has a spec and a loader
    assert file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[module_name] = module
    try:
        file_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{spec!r}: running {path} failed: {type(error).__name__}: {error}") from error
    return module
