"""An error on one rank becomes the same error on all, where the failing code holds no collective.

Without this a reward function that raises on one data-parallel rank leaves the others waiting in the next collective
until a timeout far away.
"""

from __future__ import annotations

from megatron_rl.dataflow.flow import Agree
from megatron_rl.parallel import ParallelContext


class RemoteError(RuntimeError):
    """Another rank failed; the message is that rank's."""


def agree_over(context: ParallelContext) -> Agree:
    """A function for `Flow`: every rank reports its error or None; if any has one, all raise.

    The failing rank raises its own error, with its traceback; the others a `RemoteError` that names it.
    """

    def agree(stage: str, error: Exception | None) -> None:
        message = None if error is None else f"{type(error).__name__}: {error}"
        messages = context.gather_objects(message)
        if error is not None:
            raise error
        for rank, other in enumerate(messages):
            if other is not None:
                raise RemoteError(f"{stage} failed on rank {rank}: {other}")

    return agree
