"""`Agreement`: all ranks succeed, or all raise. Ranks are threads here; tests/algorithms has them as processes."""

from __future__ import annotations

import pytest
import torch
from weights.ranks import on_ranks

from megatron_rl.config import ConfigError
from megatron_rl.parallel.agreement import TEXT_BYTES, Agreement, Alone, PeerConfigError, PeerError

WORLD = 3


def outcomes(action, statement=lambda rank: "", **how):
    """What an attempt at ``action(rank)`` ends with on each rank."""

    def work(rank, transport):
        with Agreement(transport.peers(range(WORLD), rank), "nothing was done").attempt(**how) as attempt:
            attempt.statement = statement(rank)
            action(rank)
        return rank

    return on_ranks(WORLD, work)


def fail_on(ranks, error):
    def action(rank):
        if rank in ranks:
            raise error(f"bad {rank}")

    return action


def test_all_succeed():
    assert outcomes(lambda rank: None) == [0, 1, 2]


def test_the_failed_rank_raises_its_own_error_and_the_others_name_it():
    first, second, third = outcomes(fail_on([1], KeyError), what="packing")
    assert isinstance(second, KeyError)
    assert type(first) is type(third) is PeerError
    assert str(first) == str(third) == "packing failed on rank 1: KeyError: 'bad 1'; nothing was done"


def test_of_several_failures_the_others_hear_that_of_the_lowest_rank():
    first, second, third = outcomes(fail_on([1, 2], OSError), consequence="the rest stands")
    assert [str(error) for error in (second, third)] == ["bad 1", "bad 2"]
    assert str(first) == "rank 1 failed: OSError: bad 1; the rest stands"


def test_a_mistake_in_the_configuration_is_one_on_every_rank():
    first, second, _ = outcomes(fail_on([1], ConfigError))
    assert type(second) is ConfigError
    assert isinstance(first, PeerConfigError)
    assert isinstance(first, ConfigError)


def test_ranks_that_state_different_things_fail():
    for error in outcomes(lambda rank: None, statement=lambda rank: f"version {min(rank, 1)}"):
        assert type(error) is PeerError
        assert "rank 1 failed: it states [version 1] where rank 0 states [version 0]" in str(error)


def test_a_kept_error_lets_the_body_go_on_and_a_long_message_is_cut():
    done = []

    def work(rank, transport):
        def fail():
            raise ValueError("x" * 10_000)

        with Agreement(transport.peers(range(2), rank)).attempt() as attempt:
            attempt.run(fail if rank else list)
            attempt.run(done.append, rank)

    first, second = on_ranks(2, work)
    assert done == [0]
    assert isinstance(second, ValueError)
    assert len(str(first)) < TEXT_BYTES + 100


def test_sums_and_gathers_are_the_same_on_every_rank():
    def work(rank, transport):
        peers = transport.peers(range(WORLD), rank)
        return peers.gather(torch.tensor([rank])).tolist(), peers.total(torch.tensor([rank, 1])).tolist()

    assert on_ranks(WORLD, work) == [([[0], [1], [2]], [3, 3])] * WORLD


def test_one_process_agrees_with_itself():
    with Agreement(Alone()).attempt():
        pass
    with pytest.raises(ValueError, match="own"), Agreement(Alone()).attempt("x"):
        raise ValueError("own")
