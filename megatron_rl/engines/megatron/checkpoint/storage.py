"""`MegatronStorage`: state in Megatron-Core's distributed checkpoint format, which any layout can load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.checkpoint.dtensors import with_sharded_tensors
from megatron_rl.engines.megatron.checkpoint.writer import CheckpointWriter
from megatron_rl.engines.state_storage import StateStorage
from megatron_rl.parallel import ParallelContext


class MegatronStorage(StateStorage):
    """See `StateStorage`.

    Args:
        asynchronous: write tensors in a background process.
    """

    def __init__(self, asynchronous: bool) -> None:
        self._queue = AsyncCallsQueue() if asynchronous else None

    def save(
        self,
        state: dict[str, Any],
        folder: Path,
        describe: Callable[[Path], object] | None,
        publish: Callable[[], object],
        published: Callable[[], object],
    ) -> None:
        def complete() -> None:
            writer.complete(describe, publish)
            published()

        writer = CheckpointWriter(folder)
        request = writer.begin(with_sharded_tensors(state))
        request.add_finalize_fn(complete)
        if self._queue is None:
            request.execute_sync()
        else:
            self._queue.schedule_async_request(request)

    def poll(self, wait: bool) -> None:
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=wait)

    def load(self, template: dict[str, Any], folder: Path) -> dict[str, Any]:
        return dist_checkpointing.load(with_sharded_tensors(template), str(folder))

    def load_common(self, folder: Path) -> dict[str, Any]:
        return dist_checkpointing.load_common_state_dict(str(folder))

    def per_rank(self, key: str, value: Any, context: ParallelContext) -> Any:
        return ShardedObject(key, value, (context.world_size,), (context.rank,))

    def rng_state(self) -> dict[str, Any]:
        """With Megatron's tracker."""
        return {"platform": current_platform().rng_state(), "tracker": get_cuda_rng_tracker().get_states()}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        current_platform().set_rng_state(state["platform"])
        get_cuda_rng_tracker().set_states(state["tracker"])
