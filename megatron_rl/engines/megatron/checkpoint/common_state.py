"""What a checkpoint stores beside tensors, whichever Megatron-Core writes it.

Up to 0.18 rank 0 writes ``common.pt`` through a registered strategy. From 0.19 on it is an object among the tensors,
and the writers are an extension's (nvidia-resiliency-ext) unless Megatron-Core's own are asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import dist_checkpointing

STRATEGIES = "megatron.core.dist_checkpointing.strategies.base"
base: Any = importlib.import_module(STRATEGIES) if importlib.util.find_spec(STRATEGIES) else None

HAS_CHOICE = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
SAVE_OPTIONS: dict[str, Any] = {"async_strategy": "mcore"} if HAS_CHOICE else {}


@contextlib.contextmanager
def common_written_by(run: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Within this context ``common.pt`` is written by ``run``, which gets the function that does it."""
    if base is None:
        yield
        return
    key = (base.StrategyAction.SAVE_COMMON, "torch", 1)  # the one strategy for it
    known = base.get_default_strategy(*key)

    class Common(base.SaveCommonStrategy):  # type: ignore[misc]
        """Megatron-Core's, through ``run``."""

        def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
            run(lambda: known.save_common(common_state_dict, checkpoint_dir))

        def save_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> None:
            raise AssertionError("torch_dist stores them with the tensors")

        def can_handle_sharded_objects(self) -> bool:
            return True

    base.register_default_strategy(*key, Common(known.backend, known.version))
    try:
        yield
    finally:
        base.register_default_strategy(*key, known)
