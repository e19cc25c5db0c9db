"""Batches come back from the journals of several ranks as they were handed over, or are named as missing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.trainer.inflight.batch_journal import BatchJournal, FinishedBatch, journal_path, read_batches
from megatron_rl.trainer.inflight.journal import HEAD, RECORD, Journal

RANKS = (2, 3)


def batch_of(step: int) -> FinishedBatch:
    prompts = [Prompt([step, index], f"{step}/{index}", answer=index, index=index) for index in range(5)]
    samples = [
        Sample(prompts[group], [7, number], [-0.1 * number, -step / 3], policy_version=step, group=group, reward=0.1)
        for group in range(5)
        for number in range(3)
    ]
    rewards = torch.rand(15, generator=torch.Generator().manual_seed(step))
    batch = Batch(prompts=prompts, samples=samples, sequences={"rewards": rewards}, temperature=0.7)
    return FinishedBatch(step, batch, {"rewards/mean": 0.1 + step}, {"position": step * 5, "epoch": 0}, step + 1)


def written(folder: Path, steps: range) -> dict[int, dict[int, int]]:
    """The journals' ends after each step."""
    journals = [BatchJournal(folder, rank, (number, len(RANKS))) for number, rank in enumerate(RANKS)]
    ends: dict[int, dict[int, int]] = {}
    for step in steps:
        found = batch_of(step)
        for journal in journals:
            journal.append_groups(step, found.batch)
        ends[step] = {journal.rank: journal.append_batch(found) for journal in journals}
    return ends


def same(found: FinishedBatch, expected: FinishedBatch) -> bool:
    one, two = copy.deepcopy(found), copy.deepcopy(expected)
    rewards = [batch.batch.sequences.pop("rewards") for batch in (one, two)]
    return one == two and torch.equal(*rewards)


def test_batches_in_flight_are_put_together_from_the_journals_of_all_ranks(tmp_path):
    ends = written(tmp_path, range(6))
    found = read_batches(tmp_path, ends[4], range(3, 5))
    assert [batch.step for batch in found] == [3, 4]
    assert all(same(batch, batch_of(batch.step)) for batch in found)
    first = found[0].batch
    assert all(sample.prompt is first.prompts[sample.group] for sample in first.samples)
    assert [batch.step for batch in read_batches(tmp_path, ends[4], range(4, 7))] == [4], "5 was written later"


@pytest.mark.parametrize("rank", RANKS)
def test_a_damaged_group_costs_its_batch_and_those_after_it(tmp_path, rank, caplog):
    ends = written(tmp_path, range(4))
    path = journal_path(tmp_path, rank)
    data = bytearray(path.read_bytes())
    place = ends[1][rank] + RECORD.size + 40  # in the first group of step 2
    data[place] ^= 1
    path.write_bytes(data)
    assert [batch.step for batch in read_batches(tmp_path, ends[3], range(1, 4))] == [1]
    groups = 3 if rank == RANKS[0] else 2
    assert f"journal {path}: record {2 * (groups + 1)} at offset {ends[1][rank]} is damaged" in caplog.text
    assert "batch 2 is not in the journals (4 of 5 groups are whole)" in caplog.text


def test_a_lost_journal_and_a_torn_one_are_named(tmp_path, caplog):
    ends = written(tmp_path, range(3))
    with journal_path(tmp_path, RANKS[0]).open("r+b") as file:
        file.truncate(ends[2][RANKS[0]] - 3)
    (found,) = read_batches(tmp_path, ends[2], [2])
    assert same(found, batch_of(2)), "the other rank has the rest of the batch, too"
    assert "is not whole" in caplog.text
    journal_path(tmp_path, RANKS[1]).unlink()
    assert read_batches(tmp_path, ends[2], [2]) == []
    assert f"{journal_path(tmp_path, RANKS[1])} cannot be read" in caplog.text


def test_a_resumed_rank_forgets_what_comes_after_the_checkpoint(tmp_path):
    ends = written(tmp_path, range(6))
    for number, rank in enumerate(RANKS):
        journal = BatchJournal(tmp_path, rank, (number, 2))
        journal.go_on_from(ends[3])
        journal.append_groups(4, batch_of(4).batch)
        assert journal.append_batch(batch_of(4)) == ends[4][rank]
        journal.close()
    assert [batch.step for batch in read_batches(tmp_path, ends[5], range(2, 6))] == [2, 3, 4]
    fresh = BatchJournal(tmp_path, RANKS[0], (0, 2))
    fresh.go_on_from({})
    assert journal_path(tmp_path, RANKS[0]).stat().st_size == HEAD.size


def test_space_of_batches_that_no_checkpoint_needs_is_given_back(tmp_path):
    ends = written(tmp_path, range(6))
    for number, rank in enumerate(RANKS):
        journal = BatchJournal(tmp_path, rank, (number, 2))
        size = journal_path(tmp_path, rank).stat().st_size
        journal.drop_before(4)
        assert journal_path(tmp_path, rank).stat().st_size == size - ends[3][rank] + HEAD.size
        journal.drop_before(4)
        journal.close()
        assert len(Journal(journal_path(tmp_path, rank)).records) == 2 * (3 if number == 0 else 2) + 2
    assert [batch.step for batch in read_batches(tmp_path, ends[5], range(4, 6))] == [4, 5]
