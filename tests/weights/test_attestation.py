"""Attestation: sums over any cut agree; each kind of fault is found, placed and named. One process plays all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from models.oracle import ALL, LLAMA, QWEN3_MOE, random_logical
from torch import Tensor

from megatron_rl.models import Architecture, hf_layout, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import Layout, ReshardPlan, WireFormat
from megatron_rl.weights.attestation import Attestor
from megatron_rl.weights.diagnosis import AttestationError, Fault, faults
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory

Shards = dict[str, Tensor]
BF16 = WireFormat(torch.bfloat16)


@dataclass(eq=False)
class Job:
    """All ranks of one push, after the transfer."""

    architecture: Architecture
    source: Layout
    target: Layout
    wire: WireFormat = BF16

    def __post_init__(self) -> None:
        plan = ReshardPlan(self.source, self.target)
        ranks = sorted({*self.source.replica_of, *self.target.replica_of})
        self.attestors = {rank: Attestor(plan, rank, self.wire) for rank in ranks}

    def held(self, layout: Layout, rank: int, seed: int, dtype: torch.dtype) -> Shards:
        tensors = empty_tensors(layout, rank, dtype)
        if rank in layout.replica_of:
            fill(
                layout, rank, tensors, in_memory(random_logical(self.architecture, seed), hf_layout(self.architecture))
            )
        return tensors

    @functools.cache  # noqa: B019  a job lives as long as the tests
    def expected(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        parts = [a.part(self.held(self.source, rank, seed, dtype)) for rank, a in self.attestors.items()]
        return torch.stack(parts).sum(0)

    def faults(self, rank: int, spoil: Callable[[Shards], object], previous: Tensor | None = None) -> list[Fault]:
        shards = self.held(self.target, rank, 1, self.wire.dtype)
        spoil(shards)
        return faults(self.attestors[rank], shards, self.expected(1), previous)


def nothing(shards: Shards) -> None:
    """Leaves the shards as they are."""


PAIRS = [(a, ParallelSizes(tp=2, pp=2), 4, 1) for a in ALL[:3]]
PAIRS += [(LLAMA, ParallelSizes(pp=2, vpp=2), 2, 1), (LLAMA, ParallelSizes(tp=2), 8, 1)]
PAIRS += [(QWEN3_MOE, ParallelSizes(ep=4), 4, 2), (QWEN3_MOE, ParallelSizes(tp=2, pp=2, ep=2, etp=2), 8, 2)]


@pytest.mark.parametrize(("architecture", "sizes", "tp", "ep"), PAIRS, ids=lambda v: getattr(v, "family", str(v)))
def test_every_rank_agrees_with_the_trainer_whatever_the_layouts(
    architecture: Architecture, sizes: ParallelSizes, tp: int, ep: int
) -> None:
    replicas = [list(range(i, i + tp)) for i in range(0, 8, tp)]
    job = Job(
        architecture,
        megatron_layout(architecture, RankGrid(sizes, 8), 64),
        rollout_layout(architecture, tp, replicas, ep),
    )
    expected = job.expected(1)
    for rank, attestor in job.attestors.items():
        assert faults(attestor, job.held(job.target, rank, 1, torch.bfloat16), expected) == []
        changed = faults(attestor, job.held(job.target, rank, 2, torch.bfloat16), expected)
        assert len(changed) == len(attestor.held), "a rank that holds another model must see each of its regions differ"
    counted = sum(region.rectangle.numel for a in job.attestors.values() for region in a.sent)
    assert counted == sum(tensor.numel() for tensor in random_logical(architecture).values()), "each element once"


@pytest.fixture(scope="module")
def llama() -> Job:
    source = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2, pp=2), 4), 64)
    return Job(LLAMA, source, rollout_layout(LLAMA, 2, [[0, 1], [2, 3]]))


NORM, QKV = "model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.qkv_proj.weight"


def test_each_flipped_bit_of_one_element_is_found(llama: Job) -> None:
    for bit in range(16):

        def flip(shards: Shards, bit: int = bit) -> None:
            shards[QKV].view(torch.int16)[5, 7] ^= -(1 << 15) if bit == 15 else 1 << bit

        (fault,) = llama.faults(1, flip)
        assert (fault.kind, fault.rank, fault.shard) == ("changed", 1, QKV)
        assert fault.tensor == "model.layers.2.self_attn.q_proj.weight"
        assert fault.rectangle == (16, 32, 0, 24)


def test_a_shard_that_never_arrived_is_missing(llama: Job) -> None:
    (fault,) = llama.faults(3, lambda shards: shards[NORM].zero_())
    assert (fault.kind, fault.tensor) == ("missing", NORM)


def test_a_shard_of_the_last_push_is_stale(llama: Job) -> None:
    old = llama.held(llama.target, 2, 0, torch.bfloat16)
    (fault,) = llama.faults(2, lambda shards: shards[NORM].copy_(old[NORM]), previous=llama.expected(0))
    assert (fault.kind, fault.tensor) == ("stale", NORM)


def test_the_other_tensor_parallel_ranks_shard_is_permuted(llama: Job) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    (fault,) = llama.faults(0, lambda shards: shards[name].copy_(llama.held(llama.target, 1, 1, torch.bfloat16)[name]))
    assert (fault.kind, fault.other) == ("permuted", f"{name}[0:24, 16:32]")


def test_two_swapped_shards_are_both_named(llama: Job) -> None:
    one, two = "model.layers.0.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"

    def swap(shards: Shards) -> None:
        kept = shards[one].clone()
        shards[one].copy_(shards[two])
        shards[two].copy_(kept)

    first, second = llama.faults(0, swap)
    assert (first.kind, second.kind) == ("permuted", "permuted")
    assert (first.tensor, first.other) == (one, f"{two}[0:24, 0:16]")
    assert (second.tensor, second.other) == (two, f"{one}[0:24, 0:16]")


def test_gate_and_up_in_the_wrong_order_are_permuted(llama: Job) -> None:
    name = "model.layers.0.mlp.gate_up_proj.weight"
    found = llama.faults(0, lambda shards: shards[name].copy_(shards[name].roll(16, 0)))
    assert [fault.kind for fault in found] == ["permuted", "permuted"]
    assert "up_proj" in found[0].other


def test_a_shard_written_twice_is_duplicated(llama: Job) -> None:
    other = "model.layers.0.input_layernorm.weight"
    (fault,) = llama.faults(0, lambda shards: shards[NORM].copy_(shards[other]))
    assert (fault.kind, fault.tensor, fault.other) == ("duplicated", NORM, f"{other}[0:24, 0:1]")


def test_swapped_elements_inside_a_shard_are_found(llama: Job) -> None:
    def swap(shards: Shards) -> None:
        shards[QKV][[3, 4]] = shards[QKV][[4, 3]]

    (fault,) = llama.faults(0, swap)
    assert (fault.kind, fault.shard) == ("changed", QKV)


def test_values_in_the_padding_are_found(llama: Job) -> None:
    (fault,) = llama.faults(1, lambda shards: shards["model.embed_tokens.weight"][31].fill_(0.5))
    assert (fault.kind, fault.shard) == ("padding", "model.embed_tokens.weight")


def test_a_replicated_shard_is_checked_on_each_of_its_ranks(llama: Job) -> None:
    for rank in range(4):
        assert len(llama.faults(rank, lambda shards: shards[NORM].mul_(2))) == 1


def test_a_wrong_dtype_is_refused_by_name(llama: Job) -> None:
    shards = llama.held(llama.target, 0, 1, torch.bfloat16)
    llama.attestors[0].check_dtypes(shards)
    with pytest.raises(ValueError, match=f"wrong dtype: rollout rank 0 holds {NORM} in torch.float16"):
        llama.attestors[0].check_dtypes(shards | {NORM: shards[NORM].half()})


def test_values_that_travel_wider_or_exempt_are_compared_as_they_travel() -> None:
    source = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2), 2), 64)
    for wire in (WireFormat(torch.float32), WireFormat(torch.bfloat16, {NORM: torch.float32})):
        job = Job(LLAMA, source, rollout_layout(LLAMA, 1, [[0], [1]]), wire)
        expected = job.expected(1, torch.bfloat16)
        shards = {name: t.to(wire.of(name)) for name, t in job.held(job.target, 0, 1, torch.bfloat16).items()}
        assert faults(job.attestors[0], shards, expected) == []
        assert faults(job.attestors[0], shards | {NORM: shards[NORM] * 1.001}, expected)


def test_the_message_names_rank_tensor_place_and_kind(llama: Job) -> None:
    found = llama.faults(3, lambda shards: [shard.zero_() for shard in shards.values()])
    message = str(AttestationError(3, found))
    assert "rollout rank 3" in message
    assert "model.embed_tokens.weight[32:50, 0:24] in model.embed_tokens.weight is all zeros" in message
    assert f"and {len(found) - 6} more" in message


def test_no_faults_without_a_cause(llama: Job) -> None:
    assert llama.faults(0, nothing) == []
