"""What `Resharder` promises beyond the right values: limits, padding, rounding, and errors that name their cause."""

from __future__ import annotations

import pytest
import torch
from reshard.random_layouts import assert_bitwise_equal, logical_values, reshard_in_memory
from reshard.test_plan import rows_layout

from megatron_rl.reshard import (
    Layout,
    LocalTransport,
    MemoryHub,
    Resharder,
    ReshardPlan,
    Shard,
    Span,
    TransportError,
    WireFormat,
)
from megatron_rl.reshard.certificate import certify

FULL = logical_values({"w": (8, 4)})


def local(source: Layout, target: Layout, **options) -> Resharder:
    return Resharder(source, target, 0, LocalTransport(), **options)


def test_padding_of_the_target_is_left_alone() -> None:
    padded = Layout("padded", {0: 0}, lambda replica: [Shard("p", (9, 5), (Span("w", 0, 8, 0, 4, 0, 0),))])
    out = torch.full((9, 5), 7.0)
    local(rows_layout("a", [0], 1), padded, wire_dtype=torch.float32).run({"a.w": FULL["w"]}, {"p": out})
    assert_bitwise_equal(out[:8, :4].contiguous(), FULL["w"], "values")
    assert bool((out[8:] == 7).all())
    assert bool((out[:, 4:] == 7).all())


def test_contiguous_destinations_of_the_wire_dtype_are_received_without_staging() -> None:
    plan = ReshardPlan(rows_layout("a", [0], 1), rows_layout("b", [1, 2], 2))
    received, reports = reshard_in_memory(plan, FULL, wire_dtype=torch.float32)
    assert_bitwise_equal(torch.cat([received[1]["b.w"], received[2]["b.w"]]), FULL["w"], "w")
    for rank in (1, 2):
        assert reports[rank].in_place_bytes == reports[rank].received_bytes == 64
        assert reports[rank].peak_staging_bytes == 0


def test_local_copies_are_rounded_like_values_that_travelled() -> None:
    same = rows_layout("b", [0], 1)
    out = torch.zeros(8, 4)
    local(rows_layout("a", [0], 1), same, wire_dtype=torch.bfloat16).run({"a.w": FULL["w"]}, {"b.w": out})
    assert_bitwise_equal(out, FULL["w"].bfloat16().float(), "w")


def test_excepted_tensors_travel_in_their_own_dtype() -> None:
    plan = ReshardPlan(rows_layout("a", [0], 1), rows_layout("b", [1], 1))
    wire = WireFormat(torch.bfloat16, {"w": torch.float32})
    received, reports = reshard_in_memory(plan, FULL, wire_dtype=wire)
    assert_bitwise_equal(received[1]["b.w"], FULL["w"], "w")
    assert reports[1].received_bytes == 4 * 32 == certify(plan, wire).received.actual


def test_parameters_that_require_grad_are_filled_in_place() -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, 4))
    resharder = local(rows_layout("a", [0], 1), rows_layout("b", [0], 1), wire_dtype=torch.float32)
    resharder.run({"a.w": torch.nn.Parameter(FULL["w"])}, {"b.w": parameter})
    assert_bitwise_equal(parameter.detach(), FULL["w"], "w")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "source tensors lack a.w"),
        ({"a.w": torch.zeros(4, 8)}, r"a.w: expected a contiguous tensor of \[8, 4\], got \[4, 8\]"),
        ({"a.w": torch.zeros(4, 8).T}, r"got \[8, 4\] with strides \[1, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors: dict[str, torch.Tensor], message: str) -> None:
    resharder = local(rows_layout("a", [0], 1), rows_layout("b", [0], 1))
    with pytest.raises(ValueError, match=message):
        resharder.run(tensors, {"b.w": torch.zeros(8, 4)})


def test_a_peer_that_never_comes_is_an_error_that_names_it() -> None:
    plan = ReshardPlan(rows_layout("a", [3], 1), rows_layout("b", [5], 1))
    hub = MemoryHub(timeout=0.2)
    resharder = Resharder(plan.source, plan.target, 5, hub.transport(5), plan=plan)
    with pytest.raises(TransportError, match="nothing arrived from rank 3 within"):
        resharder.run({}, {"b.w": torch.zeros(8, 4)})


def test_a_local_transport_refuses_to_exchange() -> None:
    plan = ReshardPlan(rows_layout("a", [3], 1), rows_layout("b", [5], 1))
    resharder = Resharder(plan.source, plan.target, 5, LocalTransport(), plan=plan)
    with pytest.raises(TransportError, match="exchanges data with rank 3"):
        resharder.run({}, {"b.w": torch.zeros(8, 4)})


def test_a_staging_limit_below_one_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="max_staging_bytes=8: expected at least 16 bytes"):
        local(rows_layout("a", [0], 1), rows_layout("b", [0], 1), max_staging_bytes=8)


def test_a_change_of_dtype_between_runs_rebuilds_the_tables() -> None:
    resharder = local(rows_layout("a", [0], 1), rows_layout("b", [0], 1), wire_dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.zeros(8, 4, dtype=torch.bfloat16)
        resharder.run({"a.w": FULL["w"].to(dtype)}, {"b.w": out})
        assert_bitwise_equal(out, FULL["w"].bfloat16(), str(dtype))
