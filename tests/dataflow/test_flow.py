"""Flows are checked before they run, printed, and free what nobody reads any more."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.dataflow.flow import FlowError
from megatron_rl.parallel.agreement import Agreement, Alone


def writing(name: str, *writes: str, reads: tuple[str, ...] = (), place: str = "") -> Stage:
    def run(batch: Batch) -> None:
        for field in writes:
            batch.tokens[field] = torch.ones(1)

    return Stage(name, run, reads, writes, place=place)


def sampling() -> Stage:
    def run(batch: Batch) -> None:
        batch.samples = [Sample(prompt, [1], [0.0]) for prompt in batch.prompts]

    return Stage("actor.sample", run, ("prompts",), ("samples",))


def test_a_stage_that_reads_what_only_a_later_stage_writes_is_refused_when_the_flow_is_built():
    with pytest.raises(FlowError, match=r"use reads 'x', which make writes only afterwards: put make before use"):
        writing("use", "y", reads=("x",)) >> writing("make", "x")


def test_a_field_that_nobody_writes_is_refused_before_anything_runs():
    ran = []
    first = Stage("first", lambda batch: ran.append(1), (), ())
    flow = first >> writing("use", "y", reads=("x",))
    with pytest.raises(FlowError, match="use reads 'x', which no earlier stage writes"):
        flow(Batch())
    assert not ran


def test_fields_are_freed_after_their_last_reader():
    seen = []
    look = Stage("look", lambda batch: seen.append("a" in batch), ("a",), ())
    later = Stage("later", lambda batch: seen.append("a" in batch), (), ())
    batch = (writing("make", "a") >> look >> later)(Batch())
    assert seen == [True, False]
    assert "a" not in batch


def test_results_that_callers_look_at_are_kept():
    batch = sampling()
    flow = Flow((batch,))
    result = flow(Batch(prompts=[Prompt([1, 2])]))
    assert len(result.samples) == 1


def test_a_stage_that_does_not_write_what_it_declares_is_an_error():
    liar = Stage("liar", lambda batch: None, (), ("x",))
    with pytest.raises(FlowError, match="liar declares that it writes"):
        Flow((liar,))(Batch())


def test_nested_flows_are_the_same_object_as_the_explicit_chain():
    a, b, c = writing("a", "x"), writing("b", "y", reads=("x",)), writing("c", "z", reads=("y",))
    assert (a >> (b >> c)).stages == (a >> b >> c).stages


def test_printing_names_stages_fields_and_places():
    text = str(writing("make", "x", place="host") >> writing("use", "y", reads=("x",)))
    assert [line.split() for line in text.splitlines()] == [
        ["stage", "reads", "writes", "where"],
        ["make", "-", "x", "host"],
        ["use", "x", "y", "-"],
    ]


class CountingPeers(Alone):
    """One process that counts its votes."""

    votes = 0

    def gather(self, value):
        self.votes += 1
        return super().gather(value)


@pytest.mark.parametrize(
    ("how", "votes"),
    [({"collective": False}, 1), ({}, 0), ({"check": lambda batch: None}, 1)],
    ids=["on its own", "collective", "collective after a check"],
)
def test_ranks_agree_on_what_each_does_on_its_own(how, votes):
    peers = CountingPeers()
    ran = []
    Flow((Stage("some", ran.append, agreement=Agreement(peers), **how),))(Batch())
    assert (len(ran), peers.votes) == (1, votes)


def test_nothing_collective_begins_after_a_failed_check():
    def fail(batch: Batch) -> None:
        raise ValueError("bad reward")

    ran = []
    with pytest.raises(ValueError, match="bad reward"):
        Flow((Stage("some", ran.append, check=fail, agreement=Agreement(Alone())),))(Batch())
    assert not ran


def test_time_of_each_stage_is_a_metric():
    batch = Flow((writing("make", "x"),))(Batch())
    assert batch.metrics["time/make_s"] >= 0


def lagging(lag: int) -> Flow:
    sample = Stage("actor.sample", lambda batch: None, ("prompts",), ("samples",), generates=True, lag=lag)
    score = Stage("reward.score", lambda batch: None, ("samples",), ("rewards",), collective=False, generates=True)
    prepare = writing("grpo.prepare", "advantages", reads=("rewards",))
    return sample >> score >> prepare >> writing("actor.optimize", "m")


def test_rollout_ranks_take_the_first_stages_as_far_as_they_can():
    sampled, trained = lagging(1).split()
    assert [stage.name for stage in sampled.stages] == ["actor.sample", "reward.score"]
    assert [stage.name for stage in trained.stages] == ["grpo.prepare", "actor.optimize"]
    with pytest.raises(FlowError, match=r"begins with the stages of rollout ranks, .* but it begins with make"):
        (writing("make", "x") >> lagging(0)).split()


def test_a_flow_with_a_lag_says_what_overlaps():
    assert str(lagging(2)).splitlines()[-2:] == [
        "lag 2: rollout ranks run actor.sample >> reward.score of step k+2",
        "       while training ranks run grpo.prepare >> actor.optimize of step k",
    ]
    assert "lag" not in str(lagging(0))
