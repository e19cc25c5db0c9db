"""The global batch depends on seed and position only: not on the number of ranks, nor on interruptions."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replica import replica
from toy_tokenizer import ToyTokenizer

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigError
from megatron_rl.data import DataError, GlobalBatchLoader, PromptDataset, PromptLoader
from megatron_rl.data.loader import epoch_order


def global_batches(num_items: int, batch: int, dp: int, steps: int, seed: int = 0) -> list[list[int]]:
    loaders = [GlobalBatchLoader(range(num_items), batch, replica(rank, dp), seed=seed) for rank in range(dp)]
    return [[item for loader in loaders for item in next(loader)] for _ in range(steps)]


@settings(deadline=None, max_examples=60)
@given(num_items=st.integers(1, 50), share=st.integers(1, 4), dp=st.sampled_from([2, 3, 4, 6]), seed=st.integers(0, 9))
def test_global_batch_does_not_depend_on_dp(num_items: int, share: int, dp: int, seed: int) -> None:
    batch = 12 * share
    assert global_batches(num_items, batch, dp, 6, seed) == global_batches(num_items, batch, 1, 6, seed)


def test_every_epoch_visits_every_record_once_in_an_order_of_its_own() -> None:
    flat = [item for step in global_batches(10, 4, 2, 10) for item in step]
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_seeded_and_leaves_global_random_state_alone() -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.get_rng_state())
    assert epoch_order(20, seed=3, epoch=1) == epoch_order(20, seed=3, epoch=1)
    assert epoch_order(20, 3, 1) != epoch_order(20, 4, 1)
    assert epoch_order(20, 3, 11) != epoch_order(20, 31, 1)
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())
    assert epoch_order(5, 0, 7, shuffle=False) == [0, 1, 2, 3, 4]


def test_order_never_changes_between_versions() -> None:
    # A resumed run may be a newer installation; a changed order would train on other data in silence.
    assert epoch_order(8, seed=0, epoch=0) == [0, 2, 1, 4, 6, 7, 3, 5]
    assert epoch_order(8, seed=0, epoch=1) == [6, 1, 0, 2, 3, 4, 5, 7]


@settings(deadline=None, max_examples=60)
@given(num_items=st.integers(1, 30), cut=st.integers(0, 12), dp=st.sampled_from([1, 2, 4]))
def test_resuming_is_exact_also_on_another_number_of_ranks(num_items: int, cut: int, dp: int) -> None:
    whole = global_batches(num_items, 4, 1, 12)
    first = GlobalBatchLoader(range(num_items), 4)
    for _ in range(cut):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = [GlobalBatchLoader(range(num_items), 4, replica(rank, dp)) for rank in range(dp)]
    for loader in resumed:
        loader.load_state_dict(state)
    rest = [[item for loader in resumed for item in next(loader)] for _ in range(12 - cut)]
    assert whole[cut:] == rest


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle": False}, {"dataset": range(11)}])
def test_a_cursor_of_other_data_or_order_is_refused(change: dict) -> None:
    state = GlobalBatchLoader(range(10), 2).state_dict()
    with pytest.raises(ConfigError, match="resume with the same data and seed"):
        GlobalBatchLoader(**({"dataset": range(10), "batch_size": 2} | change)).load_state_dict(state)


@pytest.mark.parametrize(("batch", "dp"), [(10, 4), (0, 1), (-2, 1), (1, 2)])
def test_uneven_batch_sizes_are_refused(batch: int, dp: int) -> None:
    with pytest.raises(ConfigError, match=f"use a multiple of {dp}"):
        GlobalBatchLoader(range(10), batch, replica(0, dp))


def test_no_records_are_an_error() -> None:
    with pytest.raises(DataError, match="no data"):
        GlobalBatchLoader([], 2)


@pytest.mark.parametrize("wrong", [0, 1, "actor"])
def test_what_is_no_replica_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="pass the actor"):
        GlobalBatchLoader(range(4), 2, wrong)  # type: ignore[arg-type]


def test_epochs_and_steps_are_counted() -> None:
    loader = GlobalBatchLoader(range(10), 4)
    assert loader.steps_per_epoch == 3
    for _ in range(5):
        next(loader)
    assert loader.epoch == 2.0


def test_prompt_loader_gives_batches_of_prompts() -> None:
    prompts = [Prompt([n], index=n) for n in range(6)]
    batch = PromptLoader(prompts, 4, replica(1, 2), shuffle=False).next_batch()
    assert [p.index for p in batch.prompts] == [2, 3]
    assert "prompts" in batch
    assert batch.num_sequences == 0


def test_resuming_on_other_records_of_the_same_number_is_refused_and_both_are_named() -> None:
    def loader(name: str, *prompts: str) -> PromptLoader:
        dataset = PromptDataset([{"prompt": text} for text in prompts], ToyTokenizer())
        dataset.name = name
        return PromptLoader(dataset, 2)

    state = json.loads(json.dumps(loader("a.jsonl", "1+1=", "2+2=").state_dict()))
    loader("moved.jsonl", "1+1=", "2+2=").load_state_dict(state)
    with pytest.raises(ConfigError, match=r"taken on a\.jsonl .* this run has b\.jsonl"):
        loader("b.jsonl", "1+1=", "3+3=").load_state_dict(state)
    older = {key: value for key, value in state.items() if key not in ("data", "digest")}
    loader("b.jsonl", "1+1=", "3+3=").load_state_dict(older)  # nothing is known of it
