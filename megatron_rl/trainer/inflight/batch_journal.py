"""`BatchJournal`: the batches that rollout ranks have finished, in one journal a rank, and back from there.

A rollout rank appends its share of a batch's groups, a record each, and then the batch itself without them: what is
known only when all are there. A batch is whole when all its groups and one of these are. The journals lie in
``<output_dir>/journal``. A checkpoint of a run with a lag keeps their ends, and batches in flight are read from there.
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
from megatron_rl.trainer.inflight.group import Group, Stage, group_from_bytes, group_to_bytes, oldest_version
from megatron_rl.trainer.inflight.journal import Journal, JournalError, Record, read_journal

logger = logging.getLogger(__name__)


@dataclass
class FinishedBatch:
    """A batch as rollout ranks hand it over."""

    step: int  # that trains on it
    batch: Batch  # prompts, samples, rewards, temperature; of all replicas
    metrics: dict[str, float]  # of the rollout ranks together
    source: Mapping[str, Any]  # state of the prompts after it
    calls: int  # of `Rollouts`' seeds, after it


def journal_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.journal"


class BatchJournal:
    """One rollout rank's journal.

    Args:
        rank: torchrun's.
        share: this rank's number among the rollout ranks, and how many there are.

    Raises:
        JournalError: from every method: the disk is full, or fails.
    """

    def __init__(self, folder: Path, rank: int, share: tuple[int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.share = rank, share
        self._journal = Journal(journal_path(folder, rank))
        self._starts: dict[int, int] = {}  # step -> where its records begin
        for record in self._journal.records:
            if (step := _step_of(record)) is not None:
                self._starts.setdefault(step, record.offset)

    def go_on_from(self, ends: Mapping[int, int]) -> None:
        """Forget what was written after a checkpoint that says so: the run samples it again.

        Args:
            ends: of each rank's journal; without this rank's, all is forgotten.
        """
        end = min(ends.get(self.rank, self._journal.start), self._journal.end)
        self._journal.cut(max(end, self._journal.start))
        self._starts = {step: start for step, start in self._starts.items() if start < end}

    def append_groups(self, step: int, batch: Batch) -> None:
        """Append this rank's share of the groups of ``batch``; it is on the disk when this returns."""
        number, count = self.share
        self._starts[step] = self._journal.end
        for index in range(number, len(batch.prompts), count):
            samples = [sample for sample in batch.samples if sample.group == index]
            version = oldest_version(samples) if samples else 0
            group = Group(index, batch.prompts[index], step, 0, 0, Stage.FINISHED, version, samples)
            self._journal.append(group_to_bytes(group))

    def append_batch(self, found: FinishedBatch) -> int:
        """Append the rest, when every rank has appended its groups; returns the journal's end."""
        batch = found.batch
        rest = (len(batch.prompts), batch.temperature, dict(batch.sequences))
        return self._journal.append(to_bytes((found.step, rest, found.metrics, dict(found.source), found.calls)))

    def drop_before(self, step: int) -> None:
        """Give the space of batches before ``step`` back."""
        old = [known for known in self._starts if known < step]
        if old:
            kept = [start for known, start in self._starts.items() if known >= step]
            self._journal.drop_before(min(kept, default=self._journal.end))
            self._starts = {known: start for known, start in self._starts.items() if known >= step}

    def close(self) -> None:
        self._journal.close()


def read_batches(folder: Path, ends: Mapping[int, int], steps: Sequence[int]) -> list[FinishedBatch]:
    """The whole batches of ``steps``, up to the first that is not whole; the journals do not change. What is missing
    is logged.

    Args:
        ends: of each rank's journal, as a checkpoint keeps them; what was written later is left out.
    """
    groups: dict[int, dict[int, Group]] = {step: {} for step in steps}
    rests: dict[int, Any] = {}
    for record in _records(folder, ends):
        found = _decoded(record)
        if isinstance(found, Group) and found.batch in groups:
            groups[found.batch][found.ticket] = found
        elif isinstance(found, tuple):
            rests[found[0]] = found
    batches: list[FinishedBatch] = []
    for step in steps:
        count = rests[step][1][0] if step in rests else None
        if count is None or any(index not in groups[step] for index in range(count)):
            what = "it was not finished" if count is None else f"{len(groups[step])} of {count} groups are whole"
            logger.warning(
                "batch %d is not in the journals (%s): it and later ones are sampled again, from newer weights",
                step,
                what,
            )
            break
        batches.append(_put_together(rests[step], [groups[step][index] for index in range(count)]))
    return batches


def _records(folder: Path, ends: Mapping[int, int]) -> Iterator[Record]:
    for rank, end in sorted(ends.items()):
        path = journal_path(folder, rank)
        try:
            content = read_journal(path)
        except (OSError, JournalError) as error:
            logger.warning("journal %s cannot be read: %s", path, error)
            continue
        yield from (record for record in content.records if record.offset < end)


def _decoded(record: Record) -> Any:
    """A `Group`, or the rest of a batch; None for what another program wrote."""
    try:
        found = from_bytes(record.payload)
        return group_from_bytes(record.payload) if len(found) == 3 else found
    except (RecordBytesError, TypeError) as error:
        logger.warning("record %d at offset %d is not understood: %s", record.number, record.offset, error)
        return None


def _step_of(record: Record) -> int | None:
    found = _decoded(record)
    return found.batch if isinstance(found, Group) else found[0] if found is not None else None


def _put_together(rest: Any, groups: Sequence[Group]) -> FinishedBatch:
    step, (_, temperature, sequences), metrics, source, calls = rest
    batch = Batch(
        prompts=[group.prompt for group in groups],
        samples=[sample for group in groups for sample in group.samples],
        sequences={name: torch.as_tensor(values) for name, values in sequences.items()},
        temperature=temperature,
    )
    return FinishedBatch(step, batch, metrics, source, calls)
