"""`Stage`: one named step of a flow, with the fields it reads and the fields it writes.

Building a stage runs nothing. `a >> b` makes a `Flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.batch import Batch

if TYPE_CHECKING:
    from megatron_rl.dataflow.flow import Flow


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: ``run(batch)`` mutates the batch so that every field in ``writes`` is there afterwards."""

    name: str  # "actor.sample": the part, then the verb
    run: Callable[[Batch], None]
    reads: tuple[str, ...] = ()  # fields that must be in the batch
    writes: tuple[str, ...] = ()  # fields that are in the batch afterwards
    frees: tuple[str, ...] = ()  # fields that ``run`` itself drops
    place: str = ""  # where it runs, for people: "TP2 x PP2", "rollout TP1", "host"

    def __rshift__(self, then: Stage | Flow) -> Flow:
        from megatron_rl.dataflow.flow import Flow  # Flow is built from stages; the import is here to break the cycle

        return Flow((self,)) >> then
