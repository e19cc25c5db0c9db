"""Mini-batches are the same whatever the data-parallel size."""

from __future__ import annotations

import pytest

from megatron_rl.engines.micro_batches import fill_rows
from megatron_rl.workers.mini_batches import split_mini_batches, unit_ids


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_composition_does_not_depend_on_the_data_parallel_size(parts):
    whole = split_mini_batches(range(12), [12], 0, parts, seed=5)
    split = [split_mini_batches(range(n), [5, 0, 7], rank, parts, seed=5) for rank, n in enumerate([5, 0, 7])]
    offsets = [0, 5, 5]
    for part in range(parts):
        joined = sorted(offsets[rank] + i for rank in range(3) for i in split[rank][part])
        assert joined == sorted(whole[part])


def test_every_sequence_is_in_exactly_one_part_of_near_equal_size():
    parts = split_mini_batches(range(10), [10], 0, 4, seed=1)
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert {len(part) for part in parts} == {2, 3}


def test_units_stay_together():
    units = unit_ids(6, [30, 30, 10, 10, 20, 20])
    assert units == [0, 0, 1, 1, 2, 2]
    for part in split_mini_batches(units, [3], 0, 3, seed=0):
        assert len({units[i] for i in part}) == 1
        assert len(part) == 2


def test_more_parts_than_units_gives_one_part_a_unit():
    assert split_mini_batches(range(2), [2], 0, 5, seed=0) in ([[0], [1]], [[1], [0]])


def test_another_seed_gives_another_split():
    splits = {str(split_mini_batches(range(16), [16], 0, 4, seed=seed)) for seed in range(5)}
    assert len(splits) == 5


def test_padded_micro_batches_never_split_a_unit():
    assert fill_rows([0, 0, 1, 1, 2, 2], 3) == [[0, 1], [2, 3], [4, 5]]
    assert fill_rows([5, 1, 5, 1], 4) == [[1, 3, 0, 2]]
    assert fill_rows([0, 0, 0], 2) == [[0, 1, 2]]
    assert fill_rows(range(5), 2) == [[0, 1], [2, 3], [4]]
    assert fill_rows([], 2) == []
