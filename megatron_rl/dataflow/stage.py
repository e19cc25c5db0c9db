"""`Stage`: one named step of a flow, with the fields it reads and the fields it writes.

Building a stage runs nothing. `a >> b` makes a `Flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.batch import Batch
from megatron_rl.parallel.abandon import Abandoned, abandonable
from megatron_rl.parallel.agreement import Agreement

if TYPE_CHECKING:
    from megatron_rl.dataflow.flow import Flow


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: ``run(batch)`` mutates the batch so that every field in ``writes`` is there afterwards."""

    name: str  # "actor.sample": the part, then the verb
    run: Callable[[Batch], None]
    reads: tuple[str, ...] = ()  # fields that must be in the batch
    writes: tuple[str, ...] = ()  # fields that are in the batch afterwards
    place: str = ""  # where it runs, for people: "TP2 x PP2", "rollout TP1", "host"
    collective: bool = True  # whether ranks wait for one another inside ``run``, so that all must come into it
    may_abandon: bool = False  # whether single ranks may give up in a collective ``run``, and leave no other waiting
    check: Callable[[Batch], None] | None = None  # of this rank's part of the batch, before any rank enters ``run``
    agreement: Agreement | None = None  # of the ranks that run the flow
    part: object = None  # whose step this is, for whoever looks for the parts of a flow

    def execute(self, batch: Batch, agreement: Agreement | None) -> None:
        """`check` and `run`. Collective: an error in `check`, or in a `run` that is not collective, becomes an error
        on every rank. A step that must be given up is given up where that is safe; see `parallel.abandon`.

        Args:
            agreement: None: this rank alone.
        """
        if agreement is not None and (self.check is not None or not self.collective):
            with agreement.attempt(self.name):
                self._run_alone(batch)
        else:
            self._run_alone(batch)
        if self.collective and agreement is not None and self.may_abandon:
            self._run_settled(batch, agreement)
        elif self.collective:
            self.run(batch)

    def _run_settled(self, batch: Batch, agreement: Agreement) -> None:
        """An error ends this rank, as in any collective; giving up ends all."""
        gave_up: Abandoned | None = None
        try:
            self.run(batch)
        except Abandoned as abandoned:
            gave_up = abandoned
        with agreement.attempt(self.name):
            if gave_up is not None:
                raise gave_up

    def _run_alone(self, batch: Batch) -> None:
        if self.check is not None:
            self.check(batch)
        if not self.collective:
            with abandonable():
                self.run(batch)

    def __rshift__(self, then: Stage | Flow) -> Flow:
        from megatron_rl.dataflow.flow import Flow  # Flow is built from stages; the import is here to break the cycle

        return Flow((self,)) >> then
