"""`BatchJournal`: the batches that rollout ranks have finished: a run which is killed and resumed samples none again.

Each rollout rank appends its share of a batch's groups to a journal of its own in ``<output_dir>/journal``, a record
each, and then the batch without them. A batch also says what it was made from: the weights, the prompts' state, the
seeds, the run's configuration. A resumed run comes to the same point with the same weights and takes the batch; where
anything differs it samples, and forgets the rest of the journal. So the journal saves time, and nothing depends on it:
what is damaged, or finds no room on the disk, is named and sampled again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.batch import Batch
from megatron_rl.batch.record_bytes import RecordBytesError, from_bytes, to_bytes
from megatron_rl.trainer.inflight.journal import Journal, JournalError, Record, read_journal
from megatron_rl.workers.prompt_groups.group import Group, Stage, group_from_bytes, group_to_bytes, oldest_version

logger = logging.getLogger(__name__)


@dataclass
class FinishedBatch:
    """A batch when it is sampled and scored, equal on all rollout ranks."""

    step: int  # that trains on it
    origin: str  # digest of what it was made from
    batch: Batch  # prompts, samples, rewards, temperature
    metrics: dict[str, float]  # of the rollout ranks together
    source: Mapping[str, Any]  # state of the prompts after it
    calls: int  # of `PromptSeeds`, after it


def journal_path(folder: Path, rank: int) -> Path:
    """``rank`` is torchrun's."""
    return folder / f"rank_{rank:05d}.journal"


class BatchJournal:
    """One rollout rank's journal, and what all of them hold.

    Args:
        rank: torchrun's number of this rank.
        ranks: those of all rollout ranks.
    """

    def __init__(self, folder: Path, rank: int, ranks: Sequence[int]) -> None:
        self._share = ranks.index(rank), len(ranks)
        self._journal: Journal | None = None
        self._folder, self._ranks = folder, ranks
        self._starts: dict[int, int] = {}  # step -> where its records begin
        self._known: dict[int, FinishedBatch] | None = None  # None: not read yet
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(journal_path(folder, rank))
        except (JournalError, OSError) as error:
            self._give_up(error)
            return
        for record in self._journal.records:
            if (step := _step_of(record)) is not None:
                self._starts.setdefault(step, record.offset)

    def find(self, step: int, origin: str) -> FinishedBatch | None:
        """The batch of ``step``, if it is there and made from the same. The first call reads the journals of all ranks,
        which have opened them by then."""
        if self._journal is None:
            return None
        if self._known is None:
            self._known = read_batches(self._folder, self._ranks)
        found = self._known.get(step)
        return found if found is not None and found.origin == origin else None

    def add(self, finished: FinishedBatch) -> None:
        """Append this rank's share; it is on the disk when this returns. What the journal held of this step and later
        ones is forgotten."""
        if self._journal is None:
            return
        try:
            self._append(self._journal, finished)
        except (JournalError, RecordBytesError) as error:
            self._give_up(error)

    def drop_before(self, step: int) -> None:
        """Give the space of batches before ``step`` back."""
        if self._journal is None or not any(known < step for known in self._starts):
            return
        self._starts = {known: start for known, start in self._starts.items() if known >= step}
        if self._known is not None:
            self._known = {known: batch for known, batch in self._known.items() if known >= step}
        try:
            self._journal.drop_before(min(self._starts.values(), default=self._journal.end))
        except JournalError as error:
            self._give_up(error)

    def _append(self, journal: Journal, finished: FinishedBatch) -> None:
        step, batch, (number, count) = finished.step, finished.batch, self._share
        later = [start for known, start in self._starts.items() if known >= step]
        if later:
            journal.cut(min(later))
        self._starts = {known: start for known, start in self._starts.items() if known < step} | {step: journal.end}
        if self._known is not None:
            self._known = {known: batch for known, batch in self._known.items() if known < step}
        for index in range(number, len(batch.prompts), count):
            samples = [sample for sample in batch.samples if sample.group == index]
            version = oldest_version(samples) if samples else 0
            group = Group(index, batch.prompts[index], step, 0, 0, Stage.FINISHED, version, samples)
            journal.append(to_bytes((finished.origin, group_to_bytes(group))))
        rest = (len(batch.prompts), batch.temperature, dict(batch.sequences))
        values = (step, finished.origin, rest, finished.metrics, dict(finished.source), finished.calls)
        journal.append(to_bytes(values))

    def _give_up(self, error: Exception) -> None:
        logger.warning("%s; the run goes on without a journal: after a kill it samples again", error)
        self._journal, self._known = None, None


def read_batches(folder: Path, ranks: Sequence[int]) -> dict[int, FinishedBatch]:
    """The whole batches in the journals of ``ranks``, by step; the files do not change. What is damaged is logged."""
    groups: dict[tuple[int, str], dict[int, Group]] = {}  # by step and origin: a rank may hold another origin's
    rests: dict[tuple[int, str], Any] = {}
    for record in _records(folder, ranks):
        found = _decoded(record)
        if found is not None and isinstance(found[1], Group):
            origin, group = found
            groups.setdefault((group.batch, origin), {})[group.ticket] = group
        elif found is not None:
            rests[found[:2]] = found
    batches: dict[int, FinishedBatch] = {}
    for (step, origin), rest in sorted(rests.items()):
        own, count = groups.get((step, origin), {}), rest[2][0]
        if all(index in own for index in range(count)):
            batches[step] = _put_together(rest, [own[index] for index in range(count)])
        else:
            logger.warning("batch %d is sampled again: %d of its %d groups are whole", step, len(own), count)
    return batches


def _records(folder: Path, ranks: Sequence[int]) -> Iterator[Record]:
    for rank in ranks:
        path = journal_path(folder, rank)
        try:
            yield from read_journal(path).records
        except (OSError, JournalError) as error:
            logger.warning("journal %s cannot be read: %s", path, error)


def _decoded(record: Record) -> tuple[Any, ...] | None:
    """(origin, `Group`), or the rest of a batch (step, origin, ...); None for what another version wrote."""
    try:
        found = from_bytes(record.payload)
        if len(found) == 2:
            return found[0], group_from_bytes(found[1])
        if len(found) == 6:
            return tuple(found)
        raise RecordBytesError(f"{len(found)} values")
    except (RecordBytesError, TypeError) as error:
        logger.warning("record %d at offset %d is not understood: %s", record.number, record.offset, error)
        return None


def _step_of(record: Record) -> int | None:
    found = _decoded(record)
    if found is None:
        return None
    return found[1].batch if isinstance(found[1], Group) else found[0]


def _put_together(rest: Any, groups: Sequence[Group]) -> FinishedBatch:
    step, origin, (_, temperature, sequences), metrics, source, calls = rest
    batch = Batch(
        prompts=[group.prompt for group in groups],
        samples=[sample for group in groups for sample in group.samples],
        sequences={name: torch.as_tensor(values) for name, values in sequences.items()},
        temperature=temperature,
    )
    return FinishedBatch(step, origin, batch, metrics, source, calls)
