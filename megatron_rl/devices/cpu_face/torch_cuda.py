"""What Megatron-Core's modules see as ``torch.cuda`` on CPU: streams that never wait, the CPU's generator, no memory.

Names that are not here fall through to the real module, so a query such as ``is_available()`` keeps its true answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


class Stream:
    """A stream, or an event, of a device whose work is always finished."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def _finished(self, *args: Any, **kwargs: Any) -> None: ...

    wait = wait_stream = wait_event = synchronize = record = _finished

    def record_event(self, event: Stream | None = None) -> Stream:
        return event or Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Stream) -> float:
        return 0.0


Event = ExternalStream = Stream


def current_device() -> torch.device:
    """A torch.device where the real one gives an index: Megatron-Core only passes it on as ``device=``."""
    return Stream.device


def current_stream(device: Any = None) -> Stream:
    return Stream()


default_stream = current_stream


@contextlib.contextmanager
def stream(stream: Any = None) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _no_bytes(*args: Any) -> int:
    return 0


set_device = set_stream = synchronize = empty_cache = ipc_collect = reset_peak_memory_stats = _nothing
memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _no_bytes


def is_current_stream_capturing() -> bool:
    return False


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(state)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


manual_seed_all = manual_seed
random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=manual_seed)
nvtx = SimpleNamespace(range_push=_nothing, range_pop=_nothing, mark=_nothing, range=contextlib.nullcontext)


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)
