"""How a piece travels: chains, nodes, and who sends."""

from __future__ import annotations

from collections import Counter

from megatron_rl.reshard.route import Hop, Route
from megatron_rl.reshard.topology import Topology


def test_replicas_pass_a_piece_on_so_that_the_holder_sends_it_once() -> None:
    route = Route((0, 1), (4, 5, 6, 7), Topology())
    for share in (0, 1):
        hops = route.hops(share)
        assert sorted(hop.dst for hop in hops) == [4, 5, 6, 7]
        assert [hop.src for hop in hops].count(share) == 1
        assert max(Counter(hop.src for hop in hops).values()) == 1
        assert all(
            hop.depth == 0 or Hop(hops[i - 1].src, hop.src, hop.depth - 1) == hops[i - 1] for i, hop in enumerate(hops)
        )


def test_a_rank_that_holds_what_it_needs_receives_nothing() -> None:
    route = Route((0, 1), (0, 1), Topology())
    assert route.hops(0) == []
    assert route.residents == {0, 1}


def test_a_holder_on_the_same_node_is_preferred() -> None:
    route = Route((0, 4), (1, 5), Topology(ranks_per_node=4))
    assert sorted(route.hops(0)) == [Hop(0, 1, 0), Hop(4, 5, 0)]
    assert route.num_nodes_entered == 0
    assert route.num_holder_sends == 2


def test_a_piece_enters_each_node_without_a_holder_once() -> None:
    topology = Topology(ranks_per_node=2)
    route = Route((0,), (1, 2, 3, 4, 5, 6), topology)
    crossings = Counter(topology.node(h.dst) for h in route.hops(0) if topology.node(h.src) != topology.node(h.dst))
    assert crossings == {1: 1, 2: 1, 3: 1}
    assert route.num_nodes_entered == 3
    assert [hop.src for hop in route.hops(0)].count(0) == 1


def test_each_share_is_sent_by_another_holder() -> None:
    route = Route((0, 1, 2, 3), (8, 9), Topology())
    assert [route.hops(share)[0].src for share in range(4)] == [0, 1, 2, 3]


def test_colocated_replicas_form_a_ring_so_that_all_send_alike() -> None:
    sent: Counter[int] = Counter()
    for holder in range(4):
        sent.update(hop.src for hop in Route((holder,), (0, 1, 2, 3), Topology()).hops(0))
    assert sent == dict.fromkeys(range(4), 3)


def test_hops_of_a_rank_are_its_own_part_of_all_hops() -> None:
    route = Route((0, 1), (2, 3, 4), Topology(2))
    for share in (0, 1):
        for rank in range(5):
            assert list(route.hops_of(rank, share)) == [h for h in route.hops(share) if rank in (h.src, h.dst)]
