"""The trace of a run: a file that viewers can open at any time, with a process a rank and a row a kind of work."""

from __future__ import annotations

import json
import time

import pytest

from megatron_rl.batch import Batch
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.trainer.timeline import Trace


def one_step(traces: list[Trace], step: int, *work: WorkTime) -> None:
    for trace in traces:
        trace.add(*work)
    traces[0].write([trace.take(step) for trace in traces])


def test_a_step_of_two_ranks_is_two_processes_with_rows_and_times_in_microseconds(tmp_path):
    traces = [Trace(tmp_path, 1, rank, f"dp {rank}") for rank in range(2)]
    traces[0].start(resumed=False)
    assert json.loads((tmp_path / "trace.json").read_text()) == []
    began = time.perf_counter()
    one_step(traces, 1, WorkTime("actor.sample", began, 0.25), WorkTime("generate", began, 0.125, "engine"))
    events = json.loads((tmp_path / "trace.json").read_text())
    named = {(e["pid"], e["tid"], e["name"]): e["args"] for e in events if e["ph"] == "M"}
    assert named[0, 0, "process_name"] == {"name": "rank 0 (dp 0)"}
    assert named[1, 1, "thread_name"] == {"name": "engine"}
    work = [event for event in events if event["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["name"], e["dur"], e["args"]["step"]) for e in work] == [
        (0, 0, "actor.sample", 250_000, 1),
        (0, 1, "generate", 125_000, 1),
        (1, 0, "actor.sample", 250_000, 1),
        (1, 1, "generate", 125_000, 1),
    ]
    assert all(abs(event["ts"] / 1e6 - time.time()) < 60 for event in work)


def test_the_file_is_whole_after_every_step_and_ends_with_the_last_traced_one(tmp_path):
    traces = [Trace(tmp_path, 3, 0, "")]
    traces[0].start(resumed=False)
    for step in range(1, 6):
        one_step(traces, step, WorkTime("update", time.perf_counter(), 0.1))
        events = json.loads((tmp_path / "trace.json").read_text())
        assert [event["args"]["step"] for event in events if event["ph"] == "X"] == list(range(1, min(step, 3) + 1))
    assert not traces[0]._work, "nothing is kept once the traced steps are over"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_resumed_run_goes_on_with_the_file_and_a_fresh_one_begins_it_anew(tmp_path, resumed):
    for step in (1, 2):
        trace = Trace(tmp_path, 1, 0, "")
        trace.start(resumed=resumed and step == 2)
        one_step([trace], step, WorkTime("update", time.perf_counter(), 0.1))
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [event["args"]["step"] for event in events if event["ph"] == "X"] == ([1, 2] if resumed else [2])


def test_without_traced_steps_there_is_no_file(tmp_path):
    trace = Trace(tmp_path, 0, 0, "")
    trace.start(resumed=False)
    one_step([trace], 1, WorkTime("update", time.perf_counter(), 0.1))
    assert not list(tmp_path.iterdir())


def test_a_flow_says_when_each_stage_ran():
    flow = Flow(tuple(Stage(name, lambda batch: time.sleep(0.01)) for name in ("first", "second")))
    batch = flow(Batch())
    first, second = batch.work
    assert (first.name, second.name, first.row) == ("first", "second", "stages")
    assert first.started + first.seconds <= second.started
    assert batch.metrics["time/first_s"] == first.seconds >= 0.01
