"""`Stage` and `Flow`: stages in order; a value that can be checked and printed before anything runs.

A `Stage` is one named step with the fields it reads and writes. Building one runs nothing, and `a >> b` makes a `Flow`:
`flow(batch)` runs the stages one after another on this rank's batch and frees each intermediate field after its last
reader. A flow inside a flow is simply more stages, so the short form and the explicit form are one object.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rl.batch import Batch
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.parallel.abandon import Abandoned, abandonable
from megatron_rl.parallel.agreement import Agreement

KEPT = frozenset({"samples", "rewards", "metrics"})  # results that the caller of a flow looks at


class FlowError(ValueError):
    """A flow that cannot run: the message names the stage, the field and the remedy."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: ``run(batch)`` mutates the batch so that every field in ``writes`` is there afterwards."""

    name: str  # "actor.sample": role or algorithm, then the verb
    run: Callable[[Batch], None]
    reads: tuple[str, ...] = ()  # fields that must be in the batch
    writes: tuple[str, ...] = ()  # fields that are in the batch afterwards
    place: str = ""  # where it runs, for printing: "TP2 x PP2", "rollout TP1", "host"
    collective: bool = True  # whether ranks wait for one another inside ``run``, so that all must come into it
    may_abandon: bool = False  # whether one rank may abandon a collective ``run`` without leaving another waiting
    check: Callable[[Batch], None] | None = None  # of this rank's part of the batch, before any rank enters ``run``
    agreement: Agreement | None = None  # of the ranks that run the flow
    part: object = None  # the role or algorithm whose step this is; `Trainer` finds its parts by it
    generates: bool = False  # whether it runs on rollout ranks, where the job has some
    lag: int = 0  # of the stage that samples: steps by which its weights may be older than those that are trained
    windowed: bool = False  # of the stage that samples: its groups stay in flight over steps, `workers.prompt_groups`

    def execute(self, batch: Batch, agreement: Agreement | None) -> None:
        """`check` and `run`. Collective: an error in `check`, or in a `run` that is not collective, becomes an error
        on every rank. A step past its deadline is interrupted where that is safe; see `parallel.abandon`.

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
        """An error ends this rank, as in any collective; `Abandoned` is raised on all ranks."""
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
        return Flow((self,)) >> then


@dataclass(frozen=True, slots=True)
class Flow:
    """Stages in order.

    Raises:
        FlowError: on construction, when a stage reads a field that only a later stage writes, or when two stages have
            the same name.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        for position, stage in enumerate(self.stages):
            before = {name for s in self.stages[:position] for name in s.writes}
            for name in stage.reads:
                later = next((s for s in self.stages[position + 1 :] if name in s.writes), None)
                if name not in before and later is not None and name not in later.reads:
                    raise FlowError(
                        f"{stage.name} reads {name!r}, which {later.name} writes only afterwards: "
                        f"put {later.name} before {stage.name}"
                    )

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields that the flow needs from its input batch, in order of first use."""
        needed: dict[str, None] = {}
        written: set[str] = set()
        for stage in self.stages:
            needed.update(dict.fromkeys(name for name in stage.reads if name not in written))
            written |= set(stage.writes)
        return tuple(needed)

    @property
    def writes(self) -> tuple[str, ...]:
        """Every field that some stage writes, in order."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.writes))

    def freed_after(self, position: int) -> tuple[str, ...]:
        """Fields written inside the flow whose last reader (or, unread, whose writer) is the stage at ``position``."""
        last_use: dict[str, int] = {}
        for index, stage in enumerate(self.stages):
            last_use.update(dict.fromkeys((*stage.reads, *stage.writes), index))
        return tuple(name for name in self.writes if last_use[name] == position and name not in KEPT)

    def __rshift__(self, then: Stage | Flow) -> Flow:
        return Flow(self.stages + (then.stages if isinstance(then, Flow) else (then,)))

    @property
    def lag(self) -> int:
        """Steps by which samples may be older than the weights that are trained on them."""
        return max((stage.lag for stage in self.stages), default=0)

    @property
    def windowed(self) -> bool:
        """Whether groups stay in flight over steps; else whole batches are sampled from one version each."""
        return any(stage.windowed for stage in self.stages)

    @property
    def batches_ahead(self) -> int:
        """Batches that rollout ranks hand over before training asks for them."""
        return 0 if self.windowed else self.lag

    def split(self) -> tuple[Flow, Flow]:
        """The stages that rollout ranks run, and those that training ranks run: rollout ranks take the first ones, as
        far as they can (sampling, then rewards that are no model in this job).

        Raises:
            FlowError: the first stage is none that they can run, or a later one is.
        """
        count = next((i for i, stage in enumerate(self.stages) if not stage.generates), len(self.stages))
        late = next((stage.name for stage in self.stages[count:] if stage.name.startswith("actor.sample")), None)
        if count == 0 or late is not None:
            raise FlowError(
                f"with parallel.rollout_ranks a flow begins with the stages of rollout ranks, as in actor.sample() >> "
                f"reward.score() >> grpo.update(), but it begins with {self.stages[0].name}"
            )
        return Flow(self.stages[:count]), Flow(self.stages[count:])

    def check(self, batch: Batch) -> None:
        """Raises FlowError when the batch lacks a field that the flow reads first."""
        if missing := [name for name in self.reads if name not in batch]:
            reader = next(s.name for s in self.stages if missing[0] in s.reads)
            raise FlowError(
                f"{reader} reads {missing[0]!r}, which no earlier stage writes and the input batch does not have "
                f"(it has: {', '.join(batch) or 'nothing'}); add the stage that writes it before {reader}"
            )

    @property
    def agreement(self) -> Agreement | None:
        """Of the ranks that run the flow, as its stages know them; None: one process."""
        return next((stage.agreement for stage in self.stages if stage.agreement is not None), None)

    def __call__(self, batch: Batch) -> Batch:
        """Run every stage on this rank's batch; stage wall times are written to ``batch.metrics`` as
        ``time/<stage>_s``.

        Raises:
            FlowError: a field is missing from the input, or a stage did not write what it declares.
            PeerError: a stage failed on another rank.
        """
        self.check(batch)
        agreement = self.agreement
        for position, stage in enumerate(self.stages):
            started = time.perf_counter()
            stage.execute(batch, agreement)
            batch.work.append(WorkTime.since(started, stage.name))
            batch.metrics[f"time/{stage.name}_s"] = batch.work[-1].seconds
            if absent := [name for name in stage.writes if name not in batch]:
                raise FlowError(f"{stage.name} declares that it writes {absent}, but did not")
            for name in self.freed_after(position):
                batch.free(name)
        return batch

    def __str__(self) -> str:
        rows = [("stage", "reads", "writes", "where")]
        rows += [(s.name, ", ".join(s.reads) or "-", ", ".join(s.writes) or "-", s.place or "-") for s in self.stages]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.lag:
            sampled, trained = self.split()
            ahead, now = (" >> ".join(stage.name for stage in part.stages) for part in (sampled, trained))
            if self.windowed:
                lines.append(f"windowed, lag {self.lag}: rollout ranks go on with groups of the next steps")
            else:
                lines.append(f"lag {self.lag}: rollout ranks run {ahead} of step k+{self.lag}")
            lines.append(f"       while training ranks run {now} of step k")
        return "\n".join(lines)
