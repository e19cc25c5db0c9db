"""Which implementation runs, and that a forced choice never falls back."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_rl.ops import selection
from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.ops.selection import UnavailableError, availability, choose, implementations, operations


@pytest.fixture(autouse=True)
def forget_choices(monkeypatch):
    monkeypatch.setattr(selection, "_loaded", {})
    monkeypatch.setattr(selection, "_chosen", {})
    monkeypatch.delenv(selection.ENVIRONMENT, raising=False)


def test_every_folder_is_an_operation_with_a_reference():
    assert "copy_spans" in operations()
    for op in operations():
        assert "reference" in implementations(op)
        assert callable(choose(op, "cpu", "reference"))


def test_unknown_operation_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'copy_spans'"):
        choose("copy_span", "cpu")


def test_unknown_implementation_names_the_known():
    with pytest.raises(ValueError, match=r"Known: .*reference"):
        choose("copy_spans", "cpu", "refrence")


def test_environment_forces_an_implementation(monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT, "copy_spans=reference")
    assert choose("copy_spans", "cpu").__module__ == "megatron_rl.ops.copy_spans.reference"


@pytest.mark.parametrize("text", ["", "copy_spans=reference,gae=reference"])
def test_a_choice_is_made_once_and_then_looks_at_no_file(monkeypatch, text):
    monkeypatch.setenv(selection.ENVIRONMENT, text)
    first = choose("copy_spans", "cpu"), choose("copy_spans", "cpu", "reference")

    def again(*_):
        raise AssertionError("looked at the package's folders again")

    for name in ("operations", "implementations", "load", "_forced_by_environment"):
        monkeypatch.setattr(selection, name, again)
    assert (choose("copy_spans", "cpu"), choose("copy_spans", "cpu", "reference")) == first


def test_a_choice_changes_with_the_environment(monkeypatch):
    monkeypatch.setattr(selection, "_best", lambda op, device: torch.add)
    assert choose("copy_spans", "cpu") is torch.add
    monkeypatch.setenv(selection.ENVIRONMENT, "copy_spans=reference")
    assert choose("copy_spans", "cpu").__module__ == "megatron_rl.ops.copy_spans.reference"


@pytest.mark.parametrize("text", ["copy_span=reference", "copy_spans", "copy_spans="])
def test_malformed_environment_is_an_error(monkeypatch, text):
    monkeypatch.setenv(selection.ENVIRONMENT, text)
    with pytest.raises(ValueError, match=selection.ENVIRONMENT):
        choose("copy_spans", "cpu")


def test_forced_but_unavailable_raises_with_the_reason_and_unforced_falls_to_the_next(monkeypatch, caplog):
    real = selection._import

    def without_compiler(op, implementation, device_type):
        if implementation == "cpu":
            raise UnavailableError("no C++ compiler")
        return real(op, implementation, device_type)

    monkeypatch.setattr(selection, "_import", without_compiler)
    monkeypatch.setattr(selection, "implementations", lambda op: ["cpu", "reference"])
    with pytest.raises(UnavailableError, match=r"copy_spans=cpu was asked for.*no C\+\+ compiler"):
        choose("copy_spans", "cpu", "cpu")
    with caplog.at_level(logging.INFO, selection.__name__):
        assert choose("copy_spans", "cpu").__module__.endswith("reference")
        choose("copy_spans", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "op copy_spans on cpu: reference (cpu: no C++ compiler)"
    ]


def test_availability_gives_a_reason_for_everything_that_cannot_run():
    rows = availability()
    assert {(row.op, row.implementation) for row in rows} >= {("copy_spans", "reference")}
    assert all(row.available != bool(row.reason) for row in rows)


def test_copy_spans_copies_a_strided_rectangle_with_a_cast():
    source = torch.arange(20, dtype=torch.float32).view(4, 5)
    target = torch.zeros(3, 4, dtype=torch.bfloat16)
    jobs = torch.tensor([[0, 0, 6, 1, 2, 3, 5, 4]])
    copy_spans([source], [target], jobs, implementation="reference")
    assert target.tolist() == [[0, 6, 7, 8], [0, 11, 12, 13], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "job",
    [
        [1, 0, 0, 0, 1, 1, 1, 1],
        [0, -1, 0, 0, 1, 1, 1, 1],
        [0, 0, 18, 0, 1, 3, 1, 1],
        [0, 0, 0, 10, 2, 2, 2, 2],
        [0, 0, -1, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 2, 4, 4, 3],
        [0, 0, 0, 0, -1, 4, 4, 4],
    ],
)
def test_a_job_outside_its_tensors_is_named(job):
    good = [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="job 1 leaves its tensors"):
        copy_spans([torch.zeros(20)], [torch.zeros(12)], torch.tensor([good, job, good]))


def test_non_contiguous_tensors_and_foreign_dtypes_are_refused():
    jobs = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="contiguous"):
        copy_spans([torch.zeros(4, 4).T], [torch.zeros(4)], jobs)
    with pytest.raises(ValueError, match="no cast from"):
        copy_spans([torch.zeros(4, dtype=torch.int32)], [torch.zeros(4)], jobs)
