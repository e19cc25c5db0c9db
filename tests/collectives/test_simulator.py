"""The simulated all-reduce: against a ring played step by step, figures worked out by hand, and its own limits."""

from __future__ import annotations

import pytest
from bench_allreduce import calibrated

from megatron_rl.collectives.simulator import (
    Case,
    ClusterConfig,
    LinkConfig,
    hierarchical,
    library,
    needed_second_link,
    simulate,
)

MB = 2**20
# Sockets between nodes: 10 Gbit/s a node, and as much again on a network that the library leaves idle.
SOCKETS = ClusterConfig(
    nodes=(1, 2, 8),
    ranks_per_node=8,
    inside=LinkConfig(gbytes_per_s=20, latency_us=10),
    between=LinkConfig(gbytes_per_s=1.25, latency_us=30),
    second=LinkConfig(gbytes_per_s=1.25, latency_us=30),
    host_link=LinkConfig(gbytes_per_s=20),
    library="ring",
)
# NVLink and eight 400 Gbit/s adapters with GPUDirect: what the library is made for.
FAST = SOCKETS.model_copy(
    update={
        "inside": LinkConfig(gbytes_per_s=400, latency_us=2),
        "between": LinkConfig(gbytes_per_s=400, latency_us=5),
        "second": None,
        "host_link": LinkConfig(gbytes_per_s=50),
        "library": "ring_or_tree",
    }
)


def played_ring(cluster: ClusterConfig, nodes: int, num_bytes: float) -> tuple[float, float]:
    """(seconds, bytes out of node 0) of a ring, hop by hop: all ranks send a part, then all go on together."""
    ranks, size = cluster.ranks_per_node, nodes * cluster.ranks_per_node
    node_of = [r % nodes if cluster.rank_order == "interleaved" else r // ranks for r in range(size)]
    part, seconds, left = num_bytes / size, 0.0, 0.0
    for _ in range(2 * (size - 1)):
        leaving = [0.0] * nodes
        slowest = 0.0
        for rank in range(size):
            here, there = node_of[rank], node_of[(rank + 1) % size]
            if here == there:
                slowest = max(slowest, part / cluster.inside.bytes_per_s)
            else:
                leaving[here] += part
        slowest = max(slowest, max(leaving) / cluster.between.bytes_per_s)
        hop = max(cluster.inside.latency, cluster.between.latency if nodes > 1 else 0.0)
        seconds, left = seconds + slowest + hop, left + leaving[0]
    return seconds, left


@pytest.mark.parametrize("order", ["by_node", "interleaved"])
@pytest.mark.parametrize(("nodes", "ranks"), [(1, 4), (2, 2), (2, 4), (4, 2), (8, 8), (5, 3)])
def test_the_ring_takes_as_long_as_one_played_hop_by_hop(nodes: int, ranks: int, order: str) -> None:
    cluster = SOCKETS.model_copy(update={"ranks_per_node": ranks, "rank_order": order})
    for num_bytes in (1024, 4 * MB, 1024 * MB):
        seconds, left = played_ring(cluster, nodes, num_bytes)
        found = library(cluster, nodes, num_bytes)
        assert found.seconds == pytest.approx(seconds, rel=1e-9)
        assert found.node_bytes == pytest.approx(left, rel=1e-9)


@pytest.mark.parametrize(("nodes", "less"), [(2, 0.49), (4, 0.24), (8, 0.11), (32, 0.02)])
def test_bytes_at_64_ranks(nodes: int, less: float) -> None:
    """2 (N - 1) / N against 2 (n - 1) / n of a message."""
    cluster = SOCKETS.model_copy(update={"ranks_per_node": 64 // nodes})
    flat, through_memory = library(cluster, nodes, MB), hierarchical(cluster, nodes, MB)
    assert round(1 - through_memory.node_bytes / flat.node_bytes, 2) == less
    assert hierarchical(cluster, nodes, MB, bf16_wire=True).node_bytes == through_memory.node_bytes / 2


def test_where_37_percent_can_hold() -> None:
    assert round(needed_second_link(8, 8, 0.37), 2) == 0.41
    assert round(needed_second_link(4096, 1, 0.37), 2) == 0.59  # no hierarchy: 1 / (1 - 0.37) - 1
    assert needed_second_link(2, 32, 0.37) == 0.0


def only(cluster: ClusterConfig, nodes: int, megabytes: float) -> Case:
    return simulate(cluster.model_copy(update={"nodes": (nodes,), "megabytes": (megabytes,)})).cases[0]


def test_the_second_link_saves_what_its_rate_allows() -> None:
    """8 x 8 ranks, 1 GB: the network is the slowest part, and twice the rate carries 7/8 of the bytes."""
    case = only(SOCKETS, 8, 1024)
    first, both, _ = case.others
    assert case.saving(first) == pytest.approx(1 - (7 / 8) / (63 / 64), abs=0.02)
    assert case.saving(both) == pytest.approx(1 - (7 / 8) / (63 / 64) / 2, abs=0.02)
    assert case.choice() is both


@pytest.mark.parametrize("nodes", [1, 2, 8, 64])
@pytest.mark.parametrize("megabytes", [0.001, 4, 1024])
def test_the_library_is_chosen_where_links_are_faster_than_host_memory(nodes: int, megabytes: float) -> None:
    case = only(FAST, nodes, megabytes)
    assert case.choice() is case.library
    assert all(case.saving(path) < 0 for path in case.others)


def test_trees_are_taken_for_small_messages_and_send_as_little_as_the_hierarchy_on_two_nodes() -> None:
    trees = SOCKETS.model_copy(update={"library": "ring_or_tree"})
    small = 64 * 1024
    assert library(trees, 8, small).seconds < library(SOCKETS, 8, small).seconds
    assert library(trees, 2, 64 * MB).node_bytes == hierarchical(trees, 2, 64 * MB).node_bytes


def test_more_bytes_never_take_less_time() -> None:
    sizes = [2**k for k in range(10, 31)]
    for cluster in (SOCKETS, FAST):
        for path in (library, hierarchical):
            seconds = [path(cluster, 8, size).seconds for size in sizes]
            assert seconds == sorted(seconds)


def test_a_group_of_one_rank_costs_the_library_nothing() -> None:
    alone = SOCKETS.model_copy(update={"ranks_per_node": 1})
    assert library(alone, 1, MB).seconds == library(alone, 1, MB).node_bytes == 0


def test_the_benchmark_finds_the_speeds_of_a_machine_by_what_it_took() -> None:
    machine = SOCKETS.model_copy(
        update={"ranks_per_node": 2, "host_link": None, "host_memory_gbytes_per_s": 5.0, "chunk_us": 1900.0}
    ).model_copy(update={"send_us": 0.0, "between": LinkConfig(gbytes_per_s=0.024, latency_us=40)})
    loopback = machine.model_copy(update={"between": LinkConfig(gbytes_per_s=1e9, latency_us=0)})
    shaped = [{"size_mb": size, "flat_ms": library(machine, 2, size * MB).seconds * 1e3} for size in (4, 64)]
    host = [
        {"size_mb": size, "deterministic_ms": hierarchical(loopback, 2, size * MB).seconds * 1e3} for size in (1, 64)
    ]
    found = calibrated(shaped, host)
    assert found.host_memory_gbytes_per_s == pytest.approx(5.0, rel=1e-3)
    assert found.chunk_us == pytest.approx(1900.0, rel=1e-3)
    assert found.between.gbytes_per_s == pytest.approx(0.024, rel=1e-3)
    assert found.between.latency_us == pytest.approx(40, rel=1e-2)
