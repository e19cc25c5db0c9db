"""Run on 6 ranks by test_split_world: four train TP2 x PP2, two are rollout ranks; a line for each thing that holds."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (before megatron.core)
from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.weights.target import TargetFacts
from megatron_rl.workers import Actor
from megatron_rl.workers.handover import Order, RolloutSide, Stop, TrainingSide

from megatron.core import parallel_state  # isort: skip

TRAINING, ROLLOUT = 4, 2


def say(context: ParallelContext, what: str) -> None:
    """Once for all ranks of a half."""
    dist.barrier()
    if context.rank == 0:
        print(f"held: {what} ({'rollout' if context.split.on_rollout else 'training'})", flush=True)


def check_halves(context: ParallelContext) -> None:
    split = context.split
    world, own = dist.get_world_size(), dist.get_rank()
    assert (world, own) == ((ROLLOUT, split.rank - TRAINING) if split.on_rollout else (TRAINING, split.rank))
    assert context.gather_objects(split.rank) == list(split.rollout_ranks if split.on_rollout else split.training_ranks)
    if not split.on_rollout:
        assert parallel_state.get_tensor_model_parallel_world_size() == 2
        assert parallel_state.get_pipeline_model_parallel_world_size() == 2
        assert context.sizes == ParallelSizes(tp=2, pp=2, sequence_parallel=True)
        assert context.dp_size == 1
    assert context.num_consumers == 1
    assert sorted(rank for r in split.rollout_ranks for rank in split.receivers(r)) == list(split.training_ranks)
    say(context, "each half is a world of its own")


def check_push(context: ParallelContext, folder: str, tp: int, ep: int = 1) -> None:
    """The bridge carries each byte that a rollout rank holds once, and the engine then holds the checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    actor = Actor(folder, tokenizer, context=context, config={"rollout": {"tp": tp, "ep": ep}})
    split, rollouts = context.split, actor.rollouts
    if split.on_rollout:
        side = RolloutSide(split)
        order = side.order()
        assert order == Order(0, 0, push=True)
        side.ready(TargetFacts.of(rollouts.engine))
    else:
        assert rollouts.weights.needs_push()
        side = TrainingSide(split)
        side.order(Order(0, rollouts.weights.trained_version, push=True))
        rollouts.weights.target_facts = side.target
    report = rollouts.weights.push()
    moved = report.transfer
    if split.on_rollout:
        engine = rollouts.engine
        held = sum(s.numel for shard in engine.layout.shards(context.rank) for s in shard.spans)
        assert moved.received_bytes == 4 * held, (moved, 4 * held)
        check_against_file(engine, folder, tp)
        prompts = [Prompt([3 + i, 4, 5], index=i) for i in range(5)]
        made = actor.generate(prompts, n=2, temperature=1.0, max_tokens=4)
        assert [sample.prompt.index for sample in made] == [i for i in range(5) for _ in range(2)]
        assert context.gather_objects([s.response_ids for s in made]) == [[s.response_ids for s in made]] * ROLLOUT
        if context.rank == 0:
            print(f"sampled: {actor.engine.architecture.family} {[s.response_ids for s in made]}", flush=True)
        assert isinstance(side.order(), Stop)
    else:
        assert moved.received_bytes == 0
        side.stop(Stop())
    say(context, f"a push at the minimum of bytes, TP{tp}" + (f" EP{ep}" if ep > 1 else ""))
    actor.close()


def check_against_file(engine, folder: str, tp: int) -> None:
    """The engine's shards hold the values of the file (TP1: whole tensors by another reader)."""
    tensors = load_file(f"{folder}/model.safetensors")
    found = engine.targets()
    for shard in engine.layout.shards(engine.rank):
        for span in shard.spans:
            want, have = tensors[span.tensor], found[shard.name].reshape(shard.matrix_shape)
            want = want.reshape(want.shape[0], -1)
            got = have[span.row : span.row + span.num_rows, span.col : span.col + span.num_cols]
            assert torch.equal(got, want[span.row_start : span.row_stop, span.col_start : span.col_stop]), (
                shard.name,
                span,
            )


if __name__ == "__main__":
    model, mixture = sys.argv[1:]
    sizes = ParallelSizes(tp=2, pp=2, sequence_parallel=True, rollout_ranks=ROLLOUT)
    made = ParallelContext.create(sizes, timeout=120, seed=3)
    check_halves(made)
    for size in (1, 2):
        check_push(made, model, size)
        check_push(made, mixture, 2, size)
    with pytest.raises(ConfigError, match="rollout tp=4 does not divide"):
        Actor(model, AutoTokenizer.from_pretrained(model), context=made, config={"rollout": {"tp": 4}})
    say(made, "refusal")
    dist.destroy_process_group()
