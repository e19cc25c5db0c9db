"""Weight sync into rollout engines, over ranks as threads: right values, one plan, honest state when it fails."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models.oracle import ALL, LLAMA, QWEN3_MOE, random_logical, rollout_by_hand
from torch import Tensor
from weights.ranks import all_well, on_ranks

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture, hf_layout, megatron_layout, rollout_layout
from megatron_rl.models.layouts import rollout_vocab
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.parallel.agreement import PeerError
from megatron_rl.reshard import Layout, LocalTransport, Transport, TransportError
from megatron_rl.reshard.layout import Recomputed
from megatron_rl.weights.diagnosis import AttestationError
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory
from megatron_rl.weights.stream import BucketStream
from megatron_rl.weights.sync import SyncReport, WeightSync


@dataclass
class Engine:
    """The weight side of a rollout engine: in place when it has storage, by `write_shards` when it has none. What is
    written is read as late as the contract allows, when the next call comes."""

    layout: Layout
    storage: dict[str, Tensor]
    calls: list[str] = field(default_factory=list)
    loaded: dict[str, Tensor] = field(default_factory=dict)
    reading: Mapping[str, Tensor] = field(default_factory=dict)
    streams: bool = False
    bucket_copies: int = 2
    recomputes: bool = False
    fails: int = 0  # so many buckets more are refused

    def targets(self) -> Mapping[str, Tensor]:
        return self.storage

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def begin_update(self) -> None:
        self.calls.append("begin")

    def commit_update(self, version: int) -> None:
        self.calls.append(f"commit {version}")

    def abort_update(self, intact: bool) -> None:
        self.calls.append(f"abort {'intact' if intact else 'half written'}")

    def write_shards(self, shards: Mapping[str, Tensor], fault: str = "") -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in self.reading.items()}
        self.reading = shards
        if fault:
            raise RuntimeError(f"told: {fault}")
        if shards and self.fails:
            self.fails -= 1
            raise RuntimeError("a server was lost")

    def finish_update(self) -> str:
        self.write_shards({})
        self.calls.append("finish")
        return ""


def trained(a: Architecture, layout: Layout, rank: int, seed: int) -> dict[str, Tensor]:
    tensors = empty_tensors(layout, rank, torch.float32)
    fill(layout, rank, tensors, in_memory(random_logical(a, seed), hf_layout(a)))
    return tensors


CASES = [(a, ParallelSizes(tp=2, pp=2), 4, 1) for a in ALL[:3]]
CASES += [(LLAMA, ParallelSizes(pp=2, vpp=2), 2, 1), (LLAMA, ParallelSizes(tp=2), 8, 1)]
CASES += [(QWEN3_MOE, ParallelSizes(ep=4), 4, 2), (QWEN3_MOE, ParallelSizes(tp=2, pp=2, ep=2, etp=2), 8, 2)]


@pytest.mark.parametrize(("architecture", "sizes", "tp", "ep"), CASES, ids=lambda v: getattr(v, "family", str(v)))
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "streamed"])
def test_each_push_fills_every_engine_rank_as_slicing_by_hand_does(
    architecture: Architecture, sizes: ParallelSizes, tp: int, ep: int, in_place: bool
) -> None:
    world = 8
    source = megatron_layout(architecture, RankGrid(sizes, world), 64)
    target = rollout_layout(architecture, tp, [list(range(i, i + tp)) for i in range(0, world, tp)], ep)

    wire = None if in_place else torch.bfloat16

    def work(rank: int, transport: Transport) -> tuple[Engine, list[dict[str, Tensor]]]:
        engine = Engine(target, empty_tensors(target, rank, torch.bfloat16) if in_place else {}, streams=not in_place)
        sync, seen = WeightSync(source, engine, rank, transport, wire, max_staging_bytes=1 << 14), []
        for version in (3, 4):
            report = sync.push(trained(architecture, source, rank, seed=version), version)
            assert report.version == version
            assert (report.plan_s > 0) == (version == 3)
            assert report.transfer.peak_staging_bytes <= report.peak_bytes <= 1 << 14
            assert (report.num_buckets == 1) == in_place
            assert report.num_oversized == 0
            held = engine.storage if in_place else engine.loaded
            seen.append({name: tensor.clone() for name, tensor in held.items()})
        return engine, seen

    padded = rollout_vocab(architecture.vocab, tp)
    for rank, (engine, seen) in enumerate(all_well(on_ranks(world, work))):
        one = ["begin"] if in_place else ["begin", "finish"]
        assert engine.calls == [*one, "commit 3", *one, "commit 4"]
        for version, held in zip((3, 4), seen, strict=True):
            expected = rollout_by_hand(architecture, random_logical(architecture, version), rank % tp, tp, ep, padded)
            assert sorted(held) == sorted(expected)
            for name in expected:
                assert torch.equal(held[name], expected[name].bfloat16()), name


def test_trainers_and_engines_may_be_different_ranks() -> None:
    source = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2), 2), 64)
    target = rollout_layout(LLAMA, 2, [[2, 3], [4, 5]])

    def work(rank: int, transport: Transport) -> Engine:
        engine = Engine(target, empty_tensors(target, rank, torch.float32))
        tensors = trained(LLAMA, source, rank, seed=0) if rank < 2 else {}
        with pytest.raises(ConfigError, match="wire_dtype must be given"):
            WeightSync(source, engine, rank, transport).push(tensors, 1)
        WeightSync(source, engine, rank, transport, torch.float32).push(tensors, 1)
        return engine

    full = random_logical(LLAMA, 0)
    for rank, engine in enumerate(all_well(on_ranks(6, work))):
        assert engine.calls == ([] if rank < 2 else ["begin", "commit 1"])
        expected = rollout_by_hand(LLAMA, full, rank % 2, 2, 1, 64) if rank >= 2 else {}
        assert all(torch.equal(engine.storage[name], expected[name]) for name in expected)


def test_an_engine_that_would_keep_stale_derived_values_is_refused_before_any_byte_moves() -> None:
    source, plain = megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), 64), rollout_layout(LLAMA, 1, [[0]])
    turned = Recomputed("embedding_t", "model.embed_tokens.weight", torch.t)
    for streams in (False, True):
        target = replace(plain, recomputed=(turned,))
        engine = Engine(target, {} if streams else empty_tensors(target, 0, torch.float32), streams=streams)
        sync = WeightSync(source, engine, 0, LocalTransport(), torch.float32)
        with pytest.raises(ConfigError, match="1 tensors stale, first 'embedding_t'"):
            sync.push(trained(LLAMA, source, 0, seed=0), 1)
        assert not engine.calls
        assert not any(tensor.any() for tensor in engine.storage.values())
        engine.recomputes = True
        sync.push(trained(LLAMA, source, 0, seed=0), 1)
        assert engine.calls[-1] == "commit 1"


def test_a_failed_push_is_never_committed_and_the_next_one_heals() -> None:
    source = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2), 2), 64)
    target = rollout_layout(LLAMA, 1, [[0], [1]])
    engines = [Engine(target, empty_tensors(target, rank, torch.float32)) for rank in range(2)]

    def work(rank: int, transport: Transport) -> None:
        if rank == 0:  # the other rank never comes
            WeightSync(source, engines[rank], rank, transport).push(trained(LLAMA, source, rank, seed=1), 1)

    failed, _ = on_ranks(2, work, timeout=0.5)
    assert isinstance(failed, TransportError)
    assert engines[0].calls == ["begin", "abort intact"]

    def heal(rank: int, transport: Transport) -> None:
        WeightSync(source, engines[rank], rank, transport).push(trained(LLAMA, source, rank, seed=2), 2)

    all_well(on_ranks(2, heal))
    expected = rollout_by_hand(LLAMA, random_logical(LLAMA, 2), 0, 1, 1, 64)
    assert engines[0].calls[2:] == ["begin", "commit 2"]
    assert all(torch.equal(engines[0].storage[name], expected[name]) for name in expected)


TP2 = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2), 2), 64)
ONE_EACH = rollout_layout(LLAMA, 1, [[0], [1]])


def streaming(
    engines: list[Engine], work: Callable[[WeightSync, int], None] | None = None, cap: int = 1 << 14
) -> list[SyncReport | Exception]:
    """Push version 2 into engines that stream; ``work`` may prepare a rank's sync."""

    def run(rank: int, transport: Transport) -> SyncReport:
        sync = WeightSync(TP2, engines[rank], rank, transport, torch.float32, max_staging_bytes=cap)
        if work is not None:
            work(sync, rank)
        return sync.push(trained(LLAMA, TP2, rank, seed=2), 2)

    return on_ranks(2, run)


def holds_version_2(engine: Engine) -> bool:
    expected = rollout_by_hand(LLAMA, random_logical(LLAMA, 2), 0, 1, 1, 64)
    return all(torch.equal(engine.loaded[name], expected[name]) for name in expected)


def test_servers_that_are_lost_while_they_are_written_get_the_push_again() -> None:
    engines = [Engine(ONE_EACH, {}, streams=True), Engine(ONE_EACH, {}, streams=True, fails=2)]
    all_well(streaming(engines))
    assert engines[0].calls == ["begin", "finish", "begin", "finish", "begin", "finish", "commit 2"]
    assert engines[1].calls == ["begin", "begin", "begin", "finish", "commit 2"]
    assert all(map(holds_version_2, engines))
    engines[1].fails = 3
    first, second = streaming(engines)
    assert isinstance(first, PeerError)
    assert "a server was lost" in str(second)
    assert engines[0].calls[-1] == engines[1].calls[-1] == "abort half written"


def test_a_bucket_that_did_not_arrive_whole_is_not_written_and_nobody_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = "model.layers.1.self_attn.o_proj.weight"
    engines = [Engine(ONE_EACH, {}, streams=True) for _ in range(2)]
    attest_and_write, written = BucketStream._attest_and_write, list[str]()

    def spoil(stream: BucketStream, report: Any, number: int, held: Any, *sums: Any) -> None:
        if stream._rank == 1 and spoiled in held:
            held[spoiled][3, 5] += 1
        attest_and_write(stream, report, number, held, *sums)
        written.extend(held if stream._rank == 1 and report.error is None else ())

    monkeypatch.setattr(BucketStream, "_attest_and_write", spoil)
    first, second = streaming(engines)
    assert isinstance(first, PeerError)
    assert isinstance(second, AttestationError)
    assert [fault.shard for fault in second.faults] == [spoiled]
    assert engines[0].calls == ["begin", "finish", "abort half written"], "a fault of values is not tried again"
    assert engines[1].calls == ["begin", "abort half written"]
    assert written, "buckets before it are in the engine already"
    assert spoiled not in written
    monkeypatch.undo()
    all_well(streaming(engines))
    assert all(map(holds_version_2, engines))


@pytest.mark.parametrize(("cap", "fits"), [(1 << 14, True), (1 << 12, False), (64, False)])
def test_shards_that_pass_the_limit_go_alone_and_are_counted(
    cap: int, fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [Engine(ONE_EACH, {}, streams=True) for _ in range(2)]
    with caplog.at_level(logging.WARNING, "megatron_rl.weights.stream"):
        reports = all_well(streaming(engines, cap=cap))
    assert all(map(holds_version_2, engines))
    oversized = reports[0].num_oversized
    assert (oversized == 0) == fits
    assert reports[1].num_oversized == oversized <= reports[0].num_buckets
    largest = max(math.prod(shard.shape) for shard in ONE_EACH.shards(0)) * 4
    unit = 2 * largest  # gate and up, or q, k and v, lie in one shard
    limit = unit + cap // 4 if oversized else cap
    assert all(report.peak_bytes <= limit + 256 for report in reports)
    warned = [record.message for record in caplog.records]
    assert len(warned) == bool(oversized)
    assert all(f"{oversized} of" in text and f"max_staging_bytes={cap}" in text for text in warned)


def test_ranks_that_would_cut_otherwise_are_told_before_anything_moves() -> None:
    engines = [Engine(ONE_EACH, {}, streams=True) for _ in range(2)]

    def run(rank: int, transport: Transport) -> None:
        cap = (1 << 14) << rank
        sync = WeightSync(TP2, engines[rank], rank, transport, torch.float32, max_staging_bytes=cap)
        sync.push(trained(LLAMA, TP2, rank, seed=2), 2)

    assert all(isinstance(error, PeerError) and "buckets" in str(error) for error in on_ranks(2, run))
    assert not engines[0].loaded
