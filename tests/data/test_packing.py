"""Where every token goes: packing, padding and context-parallel slicing, against a plain-Python oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.batch import Batch
from megatron_rl.data.packing import Alignment, pack, pad, split_micro_batches

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=9)


def make_batch(lengths: list[int]) -> Batch:
    rows = [[100 * (i + 1) + t for t in range(n)] for i, n in enumerate(lengths)]
    masks = [[int(t >= n // 2) for t in range(n)] for n in lengths]
    batch = Batch.from_sequences(rows, masks)
    batch.sequences["rewards"] = torch.arange(len(lengths), dtype=torch.float32)
    return batch


@given(LENGTHS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_every_prediction_of_every_sequence_is_made_on_exactly_one_context_parallel_rank(lengths, cp, tp):
    batch = make_batch(lengths)
    made = []
    for rank in range(cp):
        micro = pack(batch, range(len(lengths)), Alignment(cp, rank, tp))
        assert micro.columns % tp == 0
        ids, labels = micro.input_ids(batch).flatten(), micro.labels(batch)
        for place in (micro.target_index >= 0).nonzero().flatten().tolist():
            made.append((int(ids[place]), int(labels[place])))
    expected = [(100 * (i + 1) + t, 100 * (i + 1) + t + 1) for i, n in enumerate(lengths) for t in range(n - 1)]
    assert sorted(made) == sorted(expected)


@given(LENGTHS, st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_fields_are_aligned_with_the_prediction_and_scatter_brings_them_back(lengths, cp):
    batch = make_batch(lengths)
    out = torch.zeros(batch.num_tokens)
    for rank in range(cp):
        micro = pack(batch, range(len(lengths)), Alignment(cp, rank))
        assert torch.equal(
            micro.token_fields(batch, ["input_ids"])["input_ids"][micro.target_index >= 0],
            micro.labels(batch)[micro.target_index >= 0],
        )
        assert not micro.token_fields(batch, ["response_mask"])["response_mask"][micro.target_index < 0].any()
        micro.scatter(micro.labels(batch).float(), out)
    expected = batch["input_ids"].float()
    expected[batch.cu_seqlens[:-1]] = 0
    assert torch.equal(out, expected)


def test_context_parallel_rank_gets_the_first_and_the_mirrored_chunk_of_each_sequence():
    batch = make_batch([8, 5])
    first = pack(batch, [0, 1], Alignment(2, 0))
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 1, 6, 7]
    second = pack(batch, [0, 1], Alignment(2, 1))
    assert second.position_ids.tolist() == [2, 3, 4, 5, 2, 3, 4, 5]
    assert second.cu_seqlens.tolist() == [0, 8, 16]
    assert second.input_index.tolist() == [2, 3, 4, 5, 10, 11, 12, -1]


def test_packed_row_ends_with_one_padding_sequence():
    micro = pack(make_batch([3, 4]), [0, 1], Alignment(), total=10)
    assert micro.cu_seqlens.tolist() == [0, 3, 7, 10]
    assert micro.input_index.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1]


def test_pack_refuses_a_row_that_is_too_short():
    with pytest.raises(ValueError, match="7 tokens do not fit a micro-batch of 6"):
        pack(make_batch([3, 4]), [0, 1], Alignment(), total=6)


def test_padded_rows_hold_one_sequence_each_and_empty_rows_fill_up():
    batch = make_batch([2, 3])
    micro = pad(batch, [1, 0], Alignment(), columns=4, rows=3)
    assert micro.input_ids(batch).tolist() == [[200, 201, 202, 0], [100, 101, 0, 0], [0, 0, 0, 0]]
    assert micro.sequence_fields(batch, ["rewards"])["rewards"].tolist() == [1.0, 0.0]


def fewest_bins(sizes: list[int], budget: int) -> int:
    """By trying everything: each size into every bin with room, or a new one."""
    best = len(sizes)

    def place(rest: list[int], loads: list[int]) -> None:
        nonlocal best
        if len(loads) >= best:
            return
        if not rest:
            best = len(loads)
            return
        for i in range(len(loads)):
            if loads[i] + rest[0] <= budget and loads[i] not in loads[:i]:
                place(rest[1:], [*loads[:i], loads[i] + rest[0], *loads[i + 1 :]])
        place(rest[1:], [*loads, rest[0]])

    place(sorted(sizes, reverse=True), [])
    return best


@given(st.lists(st.integers(1, 40), max_size=9), st.integers(8, 40), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_micro_batches_are_few_within_the_budget_and_an_oversized_sequence_is_alone(lengths, budget, at_least):
    shares = split_micro_batches(lengths, budget, at_least=at_least)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    for share in shares:
        assert len(share) == 1 or sum(lengths[i] for i in share) <= budget
    small = [length for length in lengths if length <= budget]
    fewest = fewest_bins(small, budget)
    bound = (11 * fewest + 6) // 9 + len(lengths) - len(small)
    assert len(shares) <= max(bound, at_least)
    assert len(shares) >= at_least
    assert all(shares) or len(lengths) < at_least


@pytest.mark.parametrize(
    ("lengths", "budget", "count"),
    [
        ([2000, 300, 200], 512, 2),  # the long one is alone, the others fill one
        ([2000] + [300] * 10, 512, 11),
        ([600] * 3 + [100] * 5, 500, 4),
        ([600], 500, 1),
        ([5, 5, 4, 4, 3, 3], 12, 2),
        ([5, 5, 4, 3, 3], 10, 2),  # LPT alone would take three
        ([], 10, 0),
    ],
)
def test_the_number_of_micro_batches_is_the_least(lengths, budget, count):
    shares = split_micro_batches(lengths, budget)
    assert len(shares) == count
    assert all(len(share) == 1 or sum(lengths[i] for i in share) <= budget for share in shares)


def test_more_micro_batches_than_needed_are_none_of_them_empty():
    assert sorted(map(len, split_micro_batches([4, 4, 4, 4, 4], 100, at_least=3))) == [1, 2, 2]
    assert sorted(map(len, split_micro_batches([900, 4, 4, 4], 100, at_least=3))) == [1, 1, 2]
    assert split_micro_batches([9, 9], 100, at_least=3).count([]) == 1


def test_micro_batches_keep_units_together():
    shares = split_micro_batches([5, 5, 5, 5, 5, 5], 10, units=[7, 8, 7, 8, 9, 9])
    assert sorted(shares) == [[0, 2], [1, 3], [4, 5]]


def test_micro_batches_are_evenly_filled():
    shares = split_micro_batches([4] * 10, 16)
    assert sorted(sum(4 for _ in share) for share in shares) == [12, 12, 16]
