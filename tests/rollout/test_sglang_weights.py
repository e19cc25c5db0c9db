"""What servers hold after a push, over stand-ins: wrong values fail it on any device, other layouts are refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from models.oracle import LLAMA, QWEN3_MOE, random_logical
from rollout.sglang_stand_in import StandIn
from transformers import AutoConfig

from megatron_rl.config import ConfigError
from megatron_rl.models import hf_layout, megatron_layout, rollout_layout
from megatron_rl.models.hf_module import architecture_of_config
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import LocalTransport
from megatron_rl.reshard.layout import Held, Layout, Recomputed
from megatron_rl.rollout import SamplingParams, ServersLostError, SGLangEngine
from megatron_rl.rollout.sglang.model_folder import check_served, delivery_of
from megatron_rl.rollout.sglang.weight_transfer import TRANSFERS, ServerLayout
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory
from megatron_rl.weights.sync import SyncReport, WeightSync

pytestmark = pytest.mark.timeout(60)
LAYOUT = rollout_layout(LLAMA, 1, [[0]])
SOURCE = megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), 64)
CAP = 1 << 13
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def server() -> Iterator[StandIn]:
    one = StandIn()
    yield one
    one.die()


def engine_over(*servers: StandIn, layout: Layout = LAYOUT, **options: Any) -> SGLangEngine:
    quick = {"recovery_timeout": 20.0, "request_timeout": 20.0} | options
    urls = [server.url for server in servers]
    return SGLangEngine(LLAMA, layout, dtype=torch.float32, urls=urls, **quick)


def held(layout: Any, version: int) -> dict[str, torch.Tensor]:
    tensors = empty_tensors(layout, 0, torch.float32)
    fill(layout, 0, tensors, in_memory(random_logical(LLAMA, version), hf_layout(LLAMA)))
    return tensors


def push(engine: SGLangEngine, version: int, cap: int = CAP) -> SyncReport:
    sync = WeightSync(SOURCE, engine, 0, LocalTransport(), torch.float32, max_staging_bytes=cap)
    return sync.push(held(SOURCE, version), version)


def equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def flip(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One bit of one element."""
    if name == O_PROJ:
        tensor.view(torch.int32)[3, 5] ^= 1
    return tensor


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_push_is_a_stream_of_buckets_below_the_limit(server: StandIn, device: str) -> None:
    server.device = device
    with engine_over(server) as engine:
        for version in (1, 2):
            report = push(engine, version)
            assert equal(server.weights, held(LAYOUT, version))
            assert report.num_buckets == server.calls.count("/update_weights_from_tensor") / version > 3
            assert 0 < report.peak_bytes <= CAP
        assert engine.policy_version == 2
        assert engine.verify_weights().compared == 1
        server.weights[O_PROJ] = server.weights[O_PROJ] + 1
        assert O_PROJ in engine.verify_weights().faults[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_server_that_holds_wrong_values_fails_the_push(server: StandIn, device: str) -> None:
    server.device = device
    with engine_over(server) as engine:
        push(engine, 1)
        server.spoil = flip
        with pytest.raises(RuntimeError, match=f"does not hold the weights.*1 parameters differ.*{O_PROJ}"):
            push(engine, 2)
        assert server.weight_version == "1"
        with pytest.raises(RuntimeError, match="middle of a weight update"):
            engine.generate([[5, 6]], SamplingParams(max_tokens=2))
        server.spoil = lambda name, tensor: tensor
        push(engine, 3)
        assert engine.policy_version == 3


def test_what_cannot_be_verified_is_said(server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    server.sglang_version, server.device = "0.5.99", "cuda"
    with engine_over(server) as engine, caplog.at_level(logging.WARNING):
        push(engine, 1)
        assert not caplog.records, "known checksums of a later version prove as much"
        server.spoil = lambda name, tensor: tensor + 1  # as if its checksums were others
        push(engine, 2)
    (record,) = caplog.records
    assert "cannot be verified" in record.message
    assert "0.5.99, whose checksums may be made in another way" in record.message
    server.sglang_version, server.spoil = "0.5.23", lambda name, tensor: tensor
    caplog.clear()
    with engine_over(server, delivery_options={"verify": False}) as engine, caplog.at_level(logging.WARNING):
        push(engine, 3)
    assert "delivery_options.verify is false" in caplog.records[-1].message


# Option of the server -> how the error names it.
REFUSED: dict[str, Any] = {
    "moe_runner_backend": "flashinfer_cutlass",
    "ep_size": 2,
    "ep_num_redundant_experts": 8,
    "pp_size": 2,
    "dp_size": 2,
    "enable_dp_attention": True,
    "attn_dp_size": 2,
    "quantization": "fp8",
    "torchao_config": "int8wo",
    "dtype": "float16",
    "speculative_algorithm": "EAGLE",
    "weight_cache_mode": "daemon",
}
OF_EXPERTS = {"moe_runner_backend", "ep_size", "ep_num_redundant_experts"}


@pytest.mark.parametrize("option", REFUSED)
def test_a_server_of_another_layout_is_refused_before_any_byte_moves(server: StandIn, option: str) -> None:
    layout = ServerLayout(tp=1, ep=1, has_experts=True, dtype="float32")
    info = {"tp_size": 1, option: REFUSED[option]}
    with pytest.raises(ConfigError, match=f"{option}={REFUSED[option]!r}"):
        layout.check(info, server.url, runs_loader=False)
    layout.check(info, server.url, runs_loader=True)
    server.options = {option: REFUSED[option]}
    with engine_over(server) as engine:
        if option in OF_EXPERTS:  # nothing to a model without experts
            push(engine, 1)
        else:
            with pytest.raises(ConfigError, match=f"{option}={REFUSED[option]!r}.*delivery=disk"):
                push(engine, 1)
            assert not server.weights
            assert not server.calls, "nothing but questions"


def test_a_loader_of_the_servers_own_may_hold_another_layout_but_not_unsaid(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    server.options = {"quantization": "fp8"}
    with engine_over(server, delivery="disk") as engine, caplog.at_level(logging.WARNING):
        report = push(engine, 1, cap=1 << 15)
    assert "/update_weights_from_disk" in server.calls
    assert report.num_buckets > 1
    assert "layout of its own: quantization='fp8'" in caplog.records[-1].message


def test_a_server_that_loses_pushed_weights_in_the_middle_asks_for_them_again(server: StandIn) -> None:
    prompts, params = [[5, 3 + i] for i in range(30)], SamplingParams(max_tokens=2)
    with engine_over(server, concurrency=4) as engine:
        push(engine, 4)
        server.die_after = 10
        successor = list[StandIn]()
        coming = threading.Thread(target=lambda: server.gone.wait(30) and successor.append(StandIn(port=server.port)))
        coming.start()
        with pytest.raises(ServersLostError, match="no server holds the weights") as lost:
            engine.generate(prompts, params)
        coming.join(30)
        answered = lost.value.answers
        assert 0 < len(answered) < 30
        push(engine, 4)
        missing = [i for i in range(30) if i not in answered]
        answers = engine.generate([prompts[i] for i in missing], params)
        assert [group[0].token_ids for group in answers] == [[3 + i] * 2 for i in missing]
        assert successor[0].started_with == ["4"] * len(missing)
        assert equal(successor[0].weights, held(LAYOUT, 4))
    successor[0].die()


@pytest.mark.parametrize("delivery", ["direct", "disk"])
def test_servers_get_each_tensor_in_the_dtype_that_they_hold(server: StandIn, delivery: str) -> None:
    layout = replace(LAYOUT, held={O_PROJ: Held(dtype=torch.bfloat16)})
    server.options = {"quantization": "fp8"} if delivery == "disk" else {}  # this stand-in fuses nothing that it loads
    with engine_over(server, layout=layout, delivery=delivery) as engine:
        assert bool(push(engine, 1, cap=1 << 15).unverified) == (delivery == "disk")
    expected = held(LAYOUT, 1)
    expected[O_PROJ] = expected[O_PROJ].bfloat16()
    assert server.weights[O_PROJ].dtype == torch.bfloat16
    assert delivery == "disk" or equal(server.weights, expected)


TRANSPOSED = O_PROJ.replace("weight", "w_t")
DERIVING = replace(LAYOUT, recomputed=(Recomputed(TRANSPOSED, O_PROJ, lambda weight: weight.T.contiguous()),))


def transpose(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {TRANSPOSED: weights[O_PROJ].T.contiguous()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_servers_compute_from_the_weights_is_computed_anew_and_compared(server: StandIn, device: str) -> None:
    server.device, server.post_load = device, transpose
    with engine_over(server, layout=DERIVING) as engine:
        for version in (1, 2):
            report = push(engine, version, cap=2 * CAP)
            assert torch.equal(server.weights[TRANSPOSED], held(LAYOUT, version)[O_PROJ].T)
            assert (report.unverified, report.peak_bytes <= 2 * CAP) == ("", True)


def test_a_server_that_would_serve_stale_derived_values_fails_the_push(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    server.post_load = transpose
    with engine_over(server, layout=DERIVING) as engine:
        push(engine, 1, cap=1 << 16)
        server.post_load = lambda weights: {}
        with pytest.raises(RuntimeError, match=f"does not hold the weights.*1 parameters differ.*{TRANSPOSED}"):
            push(engine, 2, cap=1 << 16)
        with pytest.raises(RuntimeError, match="middle of a weight update"):
            engine.generate([[5, 6]], SamplingParams(max_tokens=2))
        del server.weights[TRANSPOSED]  # plain attributes of a model are not among its checksums
        with caplog.at_level(logging.WARNING):
            assert TRANSPOSED in push(engine, 3, cap=1 << 16).unverified
    assert "cannot be verified" in caplog.records[-1].message


def test_what_only_the_servers_own_loader_computes_is_refused_before_any_byte_moves(server: StandIn) -> None:
    by_loader = tuple(replace(tensor, by_loader=True) for tensor in DERIVING.recomputed)
    with pytest.raises(ConfigError, match=f"{TRANSPOSED}.*delivery=disk"):
        engine_over(server, layout=replace(LAYOUT, recomputed=by_loader))
    assert not server.calls
    with engine_over(server, layout=replace(LAYOUT, recomputed=by_loader), delivery="disk"):
        pass


def test_each_way_of_transfer_says_what_a_bucket_costs_in_memory() -> None:
    two = rollout_layout(LLAMA, 2, [[0, 1]])
    common: dict[str, Any] = {"loop": None, "architecture": LLAMA, "layout": two, "rank": 0, "dtype": torch.bfloat16}
    common["tp_group"] = None
    copies = {name: TRANSFERS[name](**common).bucket_copies for name in TRANSFERS}
    assert copies == {"direct": 2, "flattened_bucket": 6, "disk": 6, "distributed": 6}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_what_a_server_must_be_started_with_is_read_off_the_layout(tp: int, ep: int) -> None:
    layout = rollout_layout(QWEN3_MOE, tp, [list(range(tp))], ep)
    assert ServerLayout.of(layout, torch.bfloat16) == ServerLayout(tp, ep, True, "bfloat16")
    assert ServerLayout.of(LAYOUT, torch.float32) == ServerLayout(1, 1, False, "float32")


def test_what_sglang_would_compute_otherwise_of_a_model_without_a_family_is_refused() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"vocab_size": 16, "num_key_value_heads": 2}
    phi = architecture_of_config(AutoConfig.for_model("phi", **sizes))
    with pytest.raises(ConfigError, match="computes phi without the bias of its output layer"):
        check_served(phi, 16)
    windowed = architecture_of_config(AutoConfig.for_model("starcoder2", sliding_window=8, **sizes))
    check_served(windowed, 8)
    with pytest.raises(ConfigError, match="starcoder2 has a sliding window of 8 tokens, contexts of 9 are longer"):
        check_served(windowed, 9)
    check_served(architecture_of_config(AutoConfig.for_model("olmo2", **sizes)), 1 << 20)
    assert delivery_of(windowed, None) == "flattened_bucket"
    assert delivery_of(LLAMA, None) == "direct"
