"""Run on 4 ranks: many pairs of layouts over gloo, each checked bitwise and byte for byte.

Every rank makes the full model from a seed, so the expected shards are slices of it. Bytes are counted by a transport
of this program, not by the code under test. Prints one line a case on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
import torch.distributed as dist
from reshard.random_layouts import (
    assert_bitwise_equal,
    gather_and_slice,
    logical_values,
    random_layout,
    random_shapes,
)
from torch import Tensor

from megatron_rl.models import Architecture, Experts, logical_tensors, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import (
    Layout,
    P2PTransport,
    Resharder,
    ReshardPlan,
    Shard,
    Span,
    Topology,
    TransportError,
    WireFormat,
    transport_node,
)
from megatron_rl.reshard.certificate import certify
from megatron_rl.reshard.transport import Pending

DENSE = Architecture("llama", 4, 192, 512, 8, 4, 24, 1000, tied=False)
KV_REPEATED = replace(DENSE, family="qwen2", num_kv_heads=2, qkv_bias=True, tied=True)
SPARSE = replace(DENSE, family="qwen3_moe", num_layers=2, qk_norm=True, experts=Experts(8, 2, 64))
MB = 1 << 20


@dataclass(frozen=True)
class Case:
    name: str
    source: Layout
    target: Layout
    shapes: dict[str, tuple[int, ...]]
    cap: int = 64 * MB
    wire: torch.dtype = torch.bfloat16
    topology: Topology | None = None


class CountingTransport(P2PTransport):
    """Counts what passes through."""

    def __init__(self) -> None:
        super().__init__(timeout=60)
        self.sent = self.received = 0

    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        self.sent += 0 if send is None else send.nbytes
        self.received += 0 if receive is None else receive.nbytes
        return super().exchange(peer, send, receive)


def megatron(architecture: Architecture, world: int = 4, first: int = 0, **sizes: int) -> Layout:
    layout = megatron_layout(architecture, RankGrid(ParallelSizes(**sizes), world), padded_vocab=1024)
    return replace(layout, replica_of={first + rank: replica for rank, replica in layout.replica_of.items()})


def family_cases() -> Iterator[Case]:
    two = [(0, 1), (2, 3)]
    pairs = [
        ("TP2PP2 -> TP4", DENSE, megatron(DENSE, tp=2, pp=2), rollout_layout(DENSE, 4, [range(4)])),
        ("TP4 -> DP4", DENSE, megatron(DENSE, tp=4), rollout_layout(DENSE, 1, [(r,) for r in range(4)])),
        ("TP2PP2VPP2 -> TP2 x2", DENSE, megatron(DENSE, tp=2, pp=2, vpp=2), rollout_layout(DENSE, 2, two)),
        (
            "DP4 -> TP4, KV heads repeated",
            KV_REPEATED,
            megatron(KV_REPEATED),
            rollout_layout(KV_REPEATED, 4, [range(4)]),
        ),
        ("PP2 tied -> TP2 x2", KV_REPEATED, megatron(KV_REPEATED, pp=2), rollout_layout(KV_REPEATED, 2, two)),
        ("EP4 -> TP2EP2", SPARSE, megatron(SPARSE, ep=4), rollout_layout(SPARSE, 2, two, ep=2)),
        ("TP2EP2ETP1 -> TP4EP2", SPARSE, megatron(SPARSE, tp=2, ep=2), rollout_layout(SPARSE, 4, [range(4)], ep=2)),
        ("TP2 -> apart, TP2", DENSE, megatron(DENSE, 2, tp=2), rollout_layout(DENSE, 2, [(2, 3)])),
        ("one -> apart, three replicas", DENSE, megatron(DENSE, 1), rollout_layout(DENSE, 1, [(1,), (2,), (3,)])),
    ]
    for name, architecture, source, target in pairs:
        shapes = logical_tensors(architecture)
        for cap in (MB // 8, MB, 256 * MB):
            yield Case(f"{name}, cap {cap} B", source, target, shapes, cap)
        yield Case(f"{name}, fp32, nodes of 2", source, target, shapes, wire=torch.float32, topology=Topology(2))


def random_cases() -> Iterator[Case]:
    for seed in range(12):
        rng = Random(seed)
        shapes = random_shapes(rng)
        source = random_layout(rng, "source", shapes, list(range(rng.randint(1, 4))), True, seed % 2 == 0)
        target = random_layout(rng, "target", shapes, list(range(rng.randint(0, 3), 4)), False, seed % 3 == 0)
        yield Case(f"random {seed}", source, target, shapes, rng.choice([16, 64, 4096]), torch.float32)


def run_case(case: Case, rank: int) -> str:
    plan = ReshardPlan(case.source, case.target, case.topology)
    certificate = certify(plan, WireFormat(case.wire))
    full = logical_values(case.shapes)
    sources = gather_and_slice(case.source, rank, full)
    rounded = {name: tensor.to(case.wire) for name, tensor in full.items()}
    expected = gather_and_slice(case.target, rank, rounded)
    targets = {shard.name: torch.zeros(shard.shape, dtype=case.wire) for shard in case.target.shards(rank)}
    transport = CountingTransport()
    resharder = Resharder(case.source, case.target, rank, transport, case.wire, case.cap, plan=plan)
    for _ in range(2):  # the second run replays the tables of the first
        transport.sent = transport.received = 0
        report = resharder.run(sources, targets)
        for name, tensor in expected.items():
            assert_bitwise_equal(targets[name], tensor, f"{case.name}, rank {rank}: {name}")
    assert transport.sent == report.sent_bytes == certificate.sent.get(rank, 0), (case.name, rank, report)
    assert transport.received == report.received_bytes == certificate.received_by.get(rank, 0), (case.name, rank)
    assert report.peak_staging_bytes <= case.cap, (case.name, rank, report)
    assert certificate.received.optimal
    assert certificate.inter_node.optimal
    assert certificate.holder_egress.optimal
    return f"ok {case.name}: {certificate.received.actual} bytes, {report}"


def all_cases() -> list[Case]:
    return [*family_cases(), *random_cases()]


ABSENT, MEMORY = "absent peer", "memory is read"


def check_absent_peer(rank: int) -> None:
    """Rank 3 never begins: rank 0 must say so, soon. In a group of its own, whose connection breaks by this."""
    group = dist.new_group()
    if rank == 0:
        spans = [Shard("w", (4,), (Span("w", 0, 4, 0, 1, 0, 0),))]
        source, target = (Layout(name, {r: 0}, lambda replica: spans) for name, r in (("a", 3), ("b", 0)))
        resharder = Resharder(source, target, 0, P2PTransport(group, timeout=1))
        with pytest.raises(TransportError, match="the exchange with rank 3 failed or took longer than 1 s"):
            resharder.run({}, {"w": torch.zeros(4, dtype=torch.bfloat16)})
        print(f"ok {ABSENT}: said in time", flush=True)


def check_memory_is_read(rank: int) -> None:
    """Large buffers of ranks of one machine pass by memory; where ranks 1 and 3 may not read, by message, and with the
    same bits. Both directions at once, so that neither end waits for the other."""
    allowed, read = [], transport_node.read_memory

    def reading(process: int, address: int, into: Tensor) -> bool:
        allowed.append(rank % 2 == 0 and read(process, address, into))
        return allowed[-1]

    transport, peer = P2PTransport(timeout=60), (rank + 1) % 4 if rank % 2 == 0 else (rank - 1) % 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport_node, "read_memory", reading)
        for size in (transport_node.MIN_BYTES, 3 * MB, 5 * MB):
            mine, theirs = (torch.randn(size // 4, generator=torch.Generator().manual_seed(r)) for r in (rank, peer))
            found = torch.zeros_like(theirs)
            transport.exchange(peer, mine, found).wait()
            assert_bitwise_equal(found, theirs, f"rank {rank}, {size} bytes")
    assert allowed == [rank % 2 == 0] * 3, (rank, allowed)
    if rank == 0:
        print(f"ok {MEMORY}: read where it may be", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in all_cases():
        line = run_case(case, rank)
        if rank == 0:
            print(line, flush=True)
    check_memory_is_read(rank)
    dist.barrier()
    check_absent_peer(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
