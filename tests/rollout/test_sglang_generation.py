"""What is sent to /generate, what is believed of its answers, and which server is asked: plain functions of data."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy
import pytest

from megatron_rl.rollout import SamplingParams
from megatron_rl.rollout.sglang.generation import GenerateRequest, OutdatedWeightsError, read_completions, request_body
from megatron_rl.rollout.sglang.routing import RoutedServer, State, choose
from megatron_rl.rollout.sglang.sglang_client import ServerError, check_version


def request(samples: int = 1, routed: tuple[int, int] | None = None, **params: Any) -> GenerateRequest:
    seeds = [(i + 1) << 40 for i in range(samples)]
    return GenerateRequest(3, [5, 6], seeds, SamplingParams(n=samples, **{"max_tokens": 4} | params), {2}, routed)


def result(tokens: list[int], reason: str = "length", spans: Any = None, **meta: Any) -> dict[str, Any]:
    spans = spans or [("7", 0, len(tokens))]
    meta = {
        "finish_reason": {"type": reason},
        "weight_version": spans[-1][0],
        "weight_versions": [{"version": v, "start": a, "end": b} for v, a, b in spans],
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
    } | meta
    return {"output_ids": tokens, "meta_info": meta}


def test_a_request_names_every_sample_and_gives_each_its_seed() -> None:
    body = request_body(request(2, temperature=0.7, top_k=0, stop=("x",)), ["a", "b"], "weights-7")
    assert body["input_ids"] == [[5, 6], [5, 6]]
    assert body["rid"] == ["a", "b"]
    assert body["extra_key"] == "weights-7"
    first, second = body["sampling_params"]
    assert first["sampling_seed"] != second["sampling_seed"]
    assert max(first["sampling_seed"], second["sampling_seed"]) < 2**31
    assert (first["top_k"], first["stop"], first["stop_token_ids"]) == (-1, ["x"], [2])


def test_what_a_server_generates_behind_a_stop_token_that_it_was_told_to_ignore_is_cut() -> None:
    asked = request(ignore_eos=True, stop_token_ids=(9,))
    (completion,) = read_completions([result([8, 2, 9, 8], spans=[("6", 0, 2), ("7", 2, 4)])], asked, [6, 7])
    assert (completion.token_ids, completion.finish_reason) == ([8, 2, 9], "stop")
    assert completion.policy_version_spans == [(6, 2), (7, 1)]
    assert len(completion.logprobs) == 3


def test_routed_experts_come_as_one_row_a_token_fed() -> None:
    routed = numpy.arange(5 * 2 * 3, dtype=numpy.int32)
    text = base64.b64encode(routed.tobytes()).decode()
    (completion,) = read_completions(result([8, 8, 8, 8], routed_experts=text), request(routed=(2, 3)), [7])
    assert completion.metadata["routed_experts"].shape == (5, 2, 3)


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "nonsense",
        {"output_ids": [8]},
        result([]),
        result([8] * 5),
        result([8], reason="abort"),
        result([8, 8], spans=[("7", 0, 1)]),
        result([8, 8]) | {"output_ids": [8, 9]},
    ],
)
def test_an_answer_that_is_not_whole_is_a_server_error(answer: Any) -> None:
    with pytest.raises(ServerError):
        read_completions(answer, request(), [7])


def test_weights_that_nobody_pushed_are_told_from_other_faults() -> None:
    for version in ("default", "5", "8"):
        with pytest.raises(OutdatedWeightsError, match=version):
            read_completions(result([8], spans=[(version, 0, 1)]), request(), [6, 7])


@pytest.mark.parametrize("tokens", [[8, 999_999], [-7], [64]])
def test_a_token_outside_the_vocabulary_is_a_server_error(tokens) -> None:
    with pytest.raises(ServerError, match="outside the vocabulary of 64"):
        read_completions(result(tokens), replace(request(), vocab=64), [7])


def test_a_log_probability_above_zero_is_a_server_error_beyond_rounding() -> None:
    read_completions(result([8], output_token_logprobs=[[1e-6, 8, None]]), request(), [7])
    with pytest.raises(ServerError, match="log-probability 5, which is above 0"):
        read_completions(result([8], output_token_logprobs=[[5.0, 8, None]]), request(), [7])


def test_log_probabilities_that_are_not_finite_end_the_run() -> None:
    broken = result([8], output_token_logprobs=[[None, 8, None]])
    with pytest.raises(RuntimeError, match="weights of version 7 give NaN"):
        read_completions(broken, request(), [7])


@pytest.mark.parametrize(
    ("version", "good"), [("0.5.21", 1), ("0.5.23.post1", 1), ("0.5.20", 0), ("0.6.0", 0), ("x", 0)]
)
def test_the_supported_versions(version: str, good: int) -> None:
    if good:
        check_version(version, "u")
    else:
        with pytest.raises(ValueError, match=r"supported is 0\.5\.21"):
            check_version(version, "u")


def test_the_least_loaded_ready_server_with_room_is_chosen() -> None:
    busy, idle, away = (
        RoutedServer("a", 8, State.READY, 6),
        RoutedServer("b", 8, State.READY, 1),
        RoutedServer("c", 8, State.OUTDATED),
    )
    assert choose([busy, idle, away], 2) is idle
    assert choose([busy, idle, away], 2, failed_on=[idle]) is busy
    assert choose([busy, idle, away], 2, failed_on=[idle, busy, idle]) is busy
    assert choose([busy, away], 4) is None
    assert choose([busy, away], 2, failed_on=[busy]) is busy
    assert choose([away], 1) is None
    assert choose([RoutedServer("d", 2, State.READY)], 16) is not None
