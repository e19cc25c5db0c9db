"""Streamed answers over scripted servers: what came from one that failed is continued by the next, and nothing else."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from typing import Any

import numpy
import pytest

from megatron_rl.rollout import Completion, SamplingParams
from megatron_rl.rollout.sglang.generation import GenerateRequest, OutdatedWeightsError
from megatron_rl.rollout.sglang.sglang_client import RequestError, ServerError
from megatron_rl.rollout.sglang.streaming import PartialOutput, StreamedAnswer


class Script:
    """Stands for a client: sends its chunks, then breaks off or ends."""

    url, timeout = "http://scripted", 5.0

    def __init__(self, *chunks: dict[str, Any], breaks: bool = False) -> None:
        self.chunks, self.breaks, self.asked = chunks, breaks, dict[str, Any]()

    async def stream(self, body: dict[str, Any], max_bytes: int) -> AsyncGenerator[dict[str, Any], None]:
        self.asked = body
        for chunk in self.chunks:
            yield chunk
        if self.breaks:
            raise ServerError("the connection broke")


def chunk(index: int, tokens: list[int], total: int, version: str = "7", reason: str | None = None, **meta: Any) -> Any:
    """The last of ``total`` tokens, whose log-probability is a hundredth of the token."""
    meta |= {"completion_tokens": total, "weight_version": version, "finish_reason": reason and {"type": reason}}
    meta["output_token_logprobs"] = [[-token / 100, token, None] for token in tokens]
    if reason and "weight_versions" not in meta:
        meta["weight_versions"] = [{"version": version, "start": 0, "end": total}]
    return {"index": index, "output_ids": tokens, "meta_info": meta}


def answer(samples: int = 1, routed: tuple[int, int] | None = None, **params: Any) -> StreamedAnswer:
    wanted = SamplingParams(n=samples, **{"max_tokens": 6} | params)
    return StreamedAnswer(GenerateRequest(3, [5, 6], [(i + 1) << 40 for i in range(samples)], wanted, {2}, routed))


def ask(streamed: StreamedAnswer, script: Script, *known: int) -> list[Completion]:
    ids = [f"r{i}" for i in range(len(streamed.drafts))]
    return asyncio.run(streamed.ask(script, ids, None, lambda: known or (7,)))  # type: ignore[arg-type]


def test_the_next_server_goes_on_behind_the_tokens_of_one_that_failed() -> None:
    streamed = answer(2)
    first = Script(chunk(1, [41], 1), chunk(0, [31, 32], 2), chunk(1, [42, 2], 3, reason="stop"), breaks=True)
    with pytest.raises(ServerError, match="broke"):
        ask(streamed, first)
    second = Script(chunk(0, [33, 34, 35, 36], 4, "8", "length"))
    one, two = ask(streamed, second, 7, 8)
    assert second.asked["input_ids"] == [[5, 6, 31, 32]]
    assert second.asked["sampling_params"][0]["max_new_tokens"] == 4
    assert second.asked["sampling_params"][0]["sampling_seed"] == first.asked["sampling_params"][0]["sampling_seed"]
    assert second.asked["rid"] == ["r0"]
    assert one.token_ids == [31, 32, 33, 34, 35, 36]
    assert one.logprobs == [-token / 100 for token in one.token_ids]
    assert one.policy_version_spans == [(7, 2), (8, 4)]
    assert (one.policy_version, one.finish_reason) == (8, "length")
    assert (two.token_ids, two.finish_reason, two.policy_version_spans) == ([41, 42, 2], "stop", [(7, 3)])


def test_parts_of_one_version_are_one_span() -> None:
    streamed = answer()
    with pytest.raises(ServerError):
        ask(streamed, Script(chunk(0, [31, 32], 2), breaks=True))
    assert ask(streamed, Script(chunk(0, [33], 1, reason="stop")))[0].policy_version_spans == [(7, 3)]


def test_tokens_of_an_unknown_version_are_not_kept() -> None:
    streamed = answer()
    first = Script(chunk(0, [31], 1), chunk(0, [32, 33], 3, "8"), chunk(0, [34], 4, "8"), breaks=True)
    with pytest.raises(ServerError, match="broke"):
        ask(streamed, first, 7, 8)
    assert streamed.drafts[0].tokens == [31], "32 may be of either version"


def test_a_server_with_other_weights_leaves_nothing_behind() -> None:
    streamed = answer()
    with pytest.raises(OutdatedWeightsError, match="default"):
        ask(streamed, Script(chunk(0, [31], 1), chunk(0, [32], 2, "default")))
    spans = [{"version": "5", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 2}]
    mixed = Script(chunk(0, [31, 32], 2, reason="stop", weight_versions=spans))
    with pytest.raises(OutdatedWeightsError, match="5"):
        ask(streamed, mixed)
    assert streamed.drafts[0].tokens == []


def test_what_a_server_aborted_by_itself_is_continued_with_its_exact_versions() -> None:
    streamed = answer()
    spans = [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 3}]
    with pytest.raises(ServerError, match="aborted it"):
        ask(streamed, Script(chunk(0, [31, 32, 33], 3, reason="abort", weight_versions=spans)), 6, 7)
    (completion,) = ask(streamed, Script(chunk(0, [2], 1, reason="stop")))
    assert completion.policy_version_spans == [(6, 1), (7, 3)]


def test_a_sample_that_was_complete_when_its_server_died_is_not_asked_for_again() -> None:
    streamed = answer()
    with pytest.raises(ServerError):
        ask(streamed, Script(chunk(0, [31, 32, 33, 34, 35, 36], 6), breaks=True))
    silent = Script()
    assert ask(streamed, silent)[0].finish_reason == "length"
    assert silent.asked == {}


def test_stop_texts_begin_anew_because_one_may_lie_across_the_seam() -> None:
    streamed = answer(stop=("x",))
    with pytest.raises(ServerError):
        ask(streamed, Script(chunk(0, [31, 32], 2), breaks=True))
    again = Script(chunk(0, [33], 1, reason="stop"))
    assert ask(streamed, again)[0].token_ids == [33]
    assert again.asked["input_ids"] == [[5, 6]]


def test_routed_experts_come_with_the_end_and_cover_what_was_kept() -> None:
    streamed = answer(routed=(2, 1))
    with pytest.raises(ServerError):
        ask(streamed, Script(chunk(0, [31, 32, 33, 34, 35, 36], 6), breaks=True))
    rows = numpy.arange(7 * 2, dtype=numpy.int32)
    last = chunk(0, [36], 1, reason="length", routed_experts=base64.b64encode(rows.tobytes()).decode())
    again = Script(last)
    (completion,) = ask(streamed, again)
    assert again.asked["input_ids"] == [[5, 6, 31, 32, 33, 34, 35]]
    assert completion.metadata["routed_experts"].shape == (7, 2, 1)


def test_servers_that_send_everything_each_time_are_understood() -> None:
    partial = PartialOutput()
    partial.take(chunk(0, [31], 1))
    partial.take(chunk(0, [31, 32, 33], 3))
    late = chunk(0, [31, 32, 33, 34, 35], 4)  # written while the next token came
    partial.take(late)
    assert partial.tokens == [31, 32, 33, 34]
    assert len(partial.logprobs) == 4


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": {"message": "too long", "code": 400}}, RequestError),
        ({"error": {"message": "busy", "code": 503}}, ServerError),
        ({"error": "nonsense"}, ServerError),
        ({"index": 4, "meta_info": {}}, ServerError),
        (chunk(0, [31], 5), ServerError),
        (chunk(0, [31] * 7, 7, reason="length"), ServerError),
    ],
)
def test_what_is_not_an_answer_is_an_error_and_leaves_nothing_behind(event: Any, kind: type[Exception]) -> None:
    streamed = answer()
    with pytest.raises(kind):
        ask(streamed, Script(event))
    assert streamed.drafts[0].tokens == []
    assert streamed.drafts[0].completion is None


def test_a_stream_that_ends_early_is_an_error() -> None:
    with pytest.raises(ServerError, match="ended before 1 samples"):
        ask(answer(), Script(chunk(0, [31], 1)))
