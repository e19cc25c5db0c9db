"""Batches come back from the journals of several ranks as they were handed over, or are named as missing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_disk import mounted_disk

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.trainer.inflight.batch_journal import BatchJournal, FinishedBatch, journal_path, read_batches
from megatron_rl.trainer.inflight.journal import HEAD, Journal

RANKS = (2, 3)


def batch_of(step: int, origin: str = "") -> FinishedBatch:
    prompts = [Prompt([step, index], f"{step}/{index}", answer=index, index=index) for index in range(5)]
    samples = [
        Sample(prompts[group], [7, number], [-0.1 * number, -step / 3], policy_version=step, group=group, reward=0.1)
        for group in range(5)
        for number in range(3)
    ]
    rewards = torch.rand(15, generator=torch.Generator().manual_seed(step))
    batch = Batch(prompts=prompts, samples=samples, sequences={"rewards": rewards}, temperature=0.7)
    state = {"position": step * 5, "epoch": 0}
    return FinishedBatch(step, origin or f"made {step}", batch, {"rewards/mean": 0.1 + step}, state, step + 1)


def written(folder: Path, steps: range) -> None:
    for rank in RANKS:
        journal = BatchJournal(folder, rank, RANKS)
        for step in steps:
            journal.add(batch_of(step))


def same(found: FinishedBatch | None, expected: FinishedBatch) -> bool:
    if found is None:
        return False
    one, two = copy.deepcopy(found), copy.deepcopy(expected)
    rewards = [batch.batch.sequences.pop("rewards") for batch in (one, two)]
    return one == two and torch.equal(*rewards)


def test_batches_are_put_together_from_the_journals_of_all_ranks(tmp_path):
    written(tmp_path, range(4))
    for rank in RANKS:
        journal = BatchJournal(tmp_path, rank, RANKS)
        assert all(same(journal.find(step, f"made {step}"), batch_of(step)) for step in range(4))
        assert journal.find(1, "made from something else") is None
        assert journal.find(4, "made 4") is None
    found = read_batches(tmp_path, RANKS)[2].batch
    assert all(sample.prompt is found.prompts[sample.group] for sample in found.samples)


def test_a_batch_that_was_made_otherwise_replaces_it_and_all_that_came_after(tmp_path):
    written(tmp_path, range(4))
    for rank in RANKS:
        journal = BatchJournal(tmp_path, rank, RANKS)
        journal.add(batch_of(2, "made anew"))
        assert journal.find(3, "made 3") is None
        assert same(journal.find(1, "made 1"), batch_of(1))
    assert {step: batch.origin for step, batch in read_batches(tmp_path, RANKS).items()} == {
        0: "made 0",
        1: "made 1",
        2: "made anew",
    }


@pytest.mark.parametrize("first", RANKS)
def test_groups_of_two_origins_make_no_batch(tmp_path, first, caplog):
    """One rank made the batch anew before all were killed, and the other one did not."""
    written(tmp_path, range(3))
    BatchJournal(tmp_path, first, RANKS).add(batch_of(1, "made anew"))
    assert sorted(read_batches(tmp_path, RANKS)) == [0]
    assert "batch 1 is sampled again" in caplog.text


def test_journals_that_are_new_are_no_fault(tmp_path, caplog):
    for journal in [BatchJournal(tmp_path, rank, RANKS) for rank in RANKS]:
        assert journal.find(0, "made 0") is None
    assert not caplog.records


@pytest.mark.parametrize("rank", RANKS)
def test_a_damaged_group_costs_its_batch_and_no_other(tmp_path, rank, caplog):
    written(tmp_path, range(4))
    path, groups = journal_path(tmp_path, rank), 3 if rank == RANKS[0] else 2
    hit = Journal(path).records[2 * (groups + 1)]  # the first group of step 2
    data = bytearray(path.read_bytes())
    data[hit.offset + 80] ^= 1
    path.write_bytes(data)
    assert sorted(read_batches(tmp_path, RANKS)) == [0, 1, 3]
    assert f"journal {path}: record {hit.number} at offset {hit.offset} is damaged" in caplog.text
    assert "batch 2 is sampled again: 4 of its 5 groups are whole" in caplog.text


def test_a_torn_journal_and_a_lost_one_are_named(tmp_path, caplog):
    written(tmp_path, range(3))
    path = journal_path(tmp_path, RANKS[0])
    path.write_bytes(path.read_bytes()[:-3])
    found = read_batches(tmp_path, RANKS)
    assert same(found[2], batch_of(2)), "the other rank says the rest of the batch, too"
    assert "is not whole" in caplog.text
    journal_path(tmp_path, RANKS[1]).unlink()
    assert read_batches(tmp_path, RANKS) == {}
    assert f"{journal_path(tmp_path, RANKS[1])} cannot be read" in caplog.text
    journal_path(tmp_path, RANKS[1]).write_text("something else, which is no journal")
    other = BatchJournal(tmp_path, RANKS[1], RANKS)
    other.add(batch_of(0))
    assert "is no journal" in caplog.text
    assert "the run goes on without a journal" in caplog.text


def test_space_of_batches_that_no_checkpoint_needs_is_given_back(tmp_path):
    written(tmp_path, range(6))
    for number, rank in enumerate(RANKS):
        journal, size = BatchJournal(tmp_path, rank, RANKS), journal_path(tmp_path, rank).stat().st_size
        for _ in range(2):
            journal.drop_before(4)
            assert journal_path(tmp_path, rank).stat().st_size == pytest.approx((size - HEAD.size) / 3, rel=0.05)
        assert len(Journal(journal_path(tmp_path, rank)).records) == 2 * (3 if number == 0 else 2) + 2
        journal.add(batch_of(6))
    assert sorted(read_batches(tmp_path, RANKS)) == [4, 5, 6]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    with mounted_disk(tmp_path, "32k") as disk:
        yield disk


def test_a_full_disk_ends_the_journal_and_not_the_run(small_disk, caplog):
    journal = BatchJournal(small_disk, 0, [0])
    for step in range(40):
        journal.add(batch_of(step))
    assert f"journal {journal_path(small_disk, 0)} could not be written (No space left on device" in caplog.text
    assert caplog.text.count("the run goes on without a journal") == 1
    whole = read_batches(small_disk, [0])
    assert all(same(batch, batch_of(step)) for step, batch in whole.items())
    assert len(whole) > 2
