"""Named implementations of one concept.

A `Registry` maps a public name ("grpo", "sglang", "triton") to the class or function behind it, so that a new
implementation is one file and one decorator line. Unknown names raise with the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """A ready-made hint, " Did you mean 'x'?", or an empty string when nothing is close."""
    hit = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {hit[0]!r}?" if hit else ""


class Registry(Generic[T]):
    """Name -> implementation, for one kind of thing.

    Example:
        ALGORITHMS: Registry[type[BaseAlgorithm]] = Registry("algorithm")

        @ALGORITHMS.register("grpo")
        class GRPO(BaseAlgorithm): ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under ``name``.

        Raises:
            ValueError: ``name`` is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]} and {entry}")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = sorted(self._entries)
            raise ValueError(f"unknown {self.kind} {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
