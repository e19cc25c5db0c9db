"""Which layers a pipeline stage holds, and how many vocabulary rows a rank owns."""

from __future__ import annotations

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.models.pipeline import chunk_layout, is_uneven, padded_vocab, stage_layers


def test_stage_layers_interleaves_chunks_as_megatron_does():
    # 8 layers, 2 stages, 2 chunks each: the drawing in Megatron-Core's `get_num_layers_to_build`.
    placed = {(rank, stage): list(stage_layers(8, 2, 2, rank, stage)) for rank in range(2) for stage in range(2)}
    assert placed == {(0, 0): [0, 1], (0, 1): [4, 5], (1, 0): [2, 3], (1, 1): [6, 7]}


def test_stage_layers_gives_the_first_chunks_one_more_when_layers_do_not_divide():
    assert [list(stage_layers(5, 2, 1, rank)) for rank in range(2)] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(("layers", "pp", "vpp"), [(1, 1, 1), (5, 2, 1), (7, 2, 3), (8, 4, 2), (61, 16, 1), (9, 2, 2)])
def test_every_layer_is_placed_exactly_once_and_chunks_differ_by_at_most_one(layers, pp, vpp):
    chunks = [stage_layers(layers, pp, vpp, rank, stage) for stage in range(vpp) for rank in range(pp)]
    assert [layer for chunk in chunks for layer in chunk] == list(range(layers))
    sizes = {len(chunk) for chunk in chunks}
    assert max(sizes) - min(sizes) <= 1
    assert is_uneven(layers, pp, vpp) == (len(sizes) == 2)


def test_stage_layers_refuses_empty_chunks():
    with pytest.raises(ConfigError, match=r"pp=2 \* vpp=2 = 4 model chunks, but the model has only 3 layers"):
        stage_layers(3, 2, 2)


def test_chunk_layout_counts_the_same_layers():
    rows = chunk_layout(5, 2, 1)
    assert rows == [["embedding", "decoder", "decoder", "decoder"], ["decoder", "decoder", "loss"]]


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(512, 1, 512), (512, 4, 512), (513, 1, 640), (96, 2, 256)])
def test_padded_vocab_rounds_up_to_the_multiple_times_tp(vocab, tp, rows):
    assert padded_vocab(vocab, tp) == rows
