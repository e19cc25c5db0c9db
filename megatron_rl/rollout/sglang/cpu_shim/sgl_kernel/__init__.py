"""Stands in for sgl-kernel, which has no build for plain CPUs: SGLang then takes its own torch code. The one kernel
that it calls without asking is written out; any other says by name that it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(
    rows: Tensor, table: Tensor, starts: Tensor, stops: Tensor, values: Tensor, *_: object, **__: object
) -> None:
    """Write the cache locations of each request into its row of ``table``; ``values`` holds them end to end."""
    offset = 0
    for row, start, stop in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True):
        table[row, start:stop] = values[offset : offset + stop - start].to(table.dtype)
        offset += stop - start


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; SGLang runs here without sgl-kernel")

    return missing
