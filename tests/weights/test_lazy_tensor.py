"""Sources that are computed when they are read arrive like others, and never are more than two of them alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from models.oracle import LLAMA, random_logical, rollout_by_hand
from torch import Tensor
from weights.ranks import all_well, on_ranks
from weights.test_sync import Engine, trained

from megatron_rl.models import megatron_layout, rollout_layout
from megatron_rl.models.layouts import rollout_vocab
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import LazyTensor, LocalTransport, Readable, Resharder, Transport
from megatron_rl.weights.fill import empty_tensors
from megatron_rl.weights.sync import WeightSync


class Alive:
    """Counts the lazy tensors whose memory somebody still holds."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[object]] = []
        self.most = 0

    def count(self) -> int:
        return sum(reference() is not None for reference in self.references)

    def make_lazy(self, tensor: Tensor) -> LazyTensor:
        """The values of ``tensor``, which lies in memory as another one."""
        hidden = -tensor

        def compute() -> Tensor:
            memory = -hidden.numpy()  # an array of its own lives as long as any tensor over it
            self.references.append(weakref.ref(memory))
            self.most = max(self.most, self.count())
            return torch.from_numpy(memory)

        return LazyTensor(torch.full_like(tensor, torch.nan), compute)


def half_lazy(tensors: Mapping[str, Tensor], make_lazy: Callable[[Tensor], LazyTensor]) -> dict[str, Readable]:
    return {name: make_lazy(t) if "linear" in name else t for name, t in tensors.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_lazy_weights_arrive_and_are_attested(tp: int, wire: torch.dtype) -> None:
    source = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2, pp=2), 4), 64)
    target = rollout_layout(LLAMA, tp, [list(range(i, i + tp)) for i in range(0, 4, tp)])

    def work(rank: int, transport: Transport) -> tuple[Engine, Alive]:
        engine, alive = Engine(target, empty_tensors(target, rank, wire)), Alive()
        sync = WeightSync(source, engine, rank, transport, max_staging_bytes=1 << 12)
        for version in (1, 2):  # the second push replays the tables of the first
            tensors = trained(LLAMA, source, rank, seed=version)
            sync.push(half_lazy(tensors, alive.make_lazy), version)
            assert alive.count() == 0, "nothing is kept between pushes"
        return engine, alive

    full, padded = random_logical(LLAMA, 2), rollout_vocab(LLAMA.vocab, tp)
    for rank, (engine, alive) in enumerate(all_well(on_ranks(4, work))):
        expected = rollout_by_hand(LLAMA, full, rank % tp, tp, 1, padded)
        assert all(torch.equal(engine.storage[name], expected[name].to(wire)) for name in expected)
        assert 1 <= alive.most <= 2


def test_tables_made_for_plain_tensors_are_not_replayed_for_lazy_ones() -> None:
    source = megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), 64)
    target = rollout_layout(LLAMA, 1, [[0]])
    resharder = Resharder(source, target, 0, LocalTransport(), torch.float32)
    plain = trained(LLAMA, source, 0, seed=1)
    for tensors in (plain, half_lazy(plain, Alive().make_lazy), plain):
        filled = empty_tensors(target, 0, torch.float32)
        resharder.run(tensors, filled)
        expected = rollout_by_hand(LLAMA, random_logical(LLAMA, 1), 0, 1, 1, rollout_vocab(LLAMA.vocab, 1))
        assert all(torch.equal(filled[name], expected[name]) for name in expected)
