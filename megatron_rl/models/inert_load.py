"""`load_inert`: what a ``torch.save`` file of another program holds, without running any of that program's code.

torch's own restricted unpickler reads the file (``weights_only=True``). Megatron-LM's checkpoints also name classes
that it does not know (``argparse.Namespace``, enums, numpy arrays, whatever a fork adds): a namespace is taken as one,
and each other class becomes an `Inert` record, so that no import and no call of foreign code can happen.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ConfigError

NAMESPACE = "argparse.Namespace"


class Inert:
    """Placeholder for an object whose class is not loaded; subclasses carry the class's ``name``.

    Attributes:
        arguments: what the object was made from: of an enum's member, its value.
        state: what was restored into it, if anything.
    """

    name = ""

    def __new__(cls, *arguments: object) -> Inert:
        self = super().__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{self.name.rpartition('.')[2]}({', '.join(map(repr, self.arguments))})"


def load_inert(path: Path) -> Any:
    """The file's content; tensors stay on disk until they are read.

    Raises:
        ConfigError: the file is missing, damaged, or made so that only its own program can read it.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known: list[Any] = [(argparse.Namespace, NAMESPACE)]
        known += [(type("Inert", (Inert,), {"name": name}), name) for name in foreign if name != NAMESPACE]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: the checkpoint is incomplete") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = next((line for line in str(error).splitlines() if "WeightsUnpickler" in line), str(error))
        raise ConfigError(f"{path} cannot be read without running code from it, or is damaged: {reason}") from None
