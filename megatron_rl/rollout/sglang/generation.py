"""One prompt and its samples as a /generate request, and the server's answer as completions: plain functions of data.

All samples of a prompt travel in one request, so they meet the same server, whose prefix cache computes the prompt
once. An answer is accepted only if it is complete and consistent.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy

from megatron_rl.rollout.base import Completion, FinishReason, SamplingParams
from megatron_rl.rollout.sglang.sglang_client import Json, ServerError

ROUNDING = 1e-3  # how far a log-probability may lie above 0: a softmax in bf16 does not sum to 1
TOKEN_BYTES = 1024  # of JSON that a token of an answer may take: its id, log-probability and text
SAMPLE_BYTES = 1 << 16  # that each sample may take beside them
SEED_BITS = 31  # servers hold seeds in signed integers
ANSWER_FAULTS = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    OverflowError,
)  # raised by parsing what is not an answer of /generate

T = TypeVar("T")


class OutdatedWeightsError(ServerError):
    """The answer was generated, at least in part, with weights that this job did not push."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt; everything that an answer to it depends on, apart from the weights."""

    index: int  # of the prompt in the call
    token_ids: Sequence[int]
    seeds: Sequence[int]  # one a sample, from `sample_seed`
    params: SamplingParams
    eos_token_ids: Collection[int]
    routed_experts: tuple[int, int] | None = None  # (layers, experts a token) where they are to be returned
    vocab: int | None = None  # tokens that an answer may hold are below it; None = not checked

    @property
    def stop_token_ids(self) -> set[int]:
        return set(self.params.stop_token_ids) | (set() if self.params.ignore_eos else set(self.eos_token_ids))

    @property
    def max_bytes(self) -> int:
        """No answer to it is longer."""
        layers, experts = self.routed_experts or (0, 0)
        routed = layers * experts * 6  # base64 of int32, and some
        tokens = self.params.max_tokens * (TOKEN_BYTES + routed) + len(self.token_ids) * routed
        return len(self.seeds) * (SAMPLE_BYTES + tokens)


def request_body(request: GenerateRequest, request_ids: Sequence[str], cache_key: str | None = None) -> Json:
    """The JSON of a request.

    Args:
        request_ids: names for each sample, to abort them by.
        cache_key: keeps cached prefixes of other keys away.
    """
    params = request.params
    shared: Json = {
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "ignore_eos": params.ignore_eos,
        "no_stop_trim": True,
    }
    if params.stop:
        shared["stop"] = list(params.stop)
    if request.stop_token_ids:
        shared["stop_token_ids"] = sorted(request.stop_token_ids)
    body: Json = {
        "rid": list(request_ids),
        "input_ids": [list(request.token_ids)] * len(request.seeds),
        # Servers use seeds with --enable-deterministic-inference only; otherwise they do no harm.
        "sampling_params": [shared | {"sampling_seed": seed >> (64 - SEED_BITS)} for seed in request.seeds],
        "return_logprob": True,
    }
    if request.routed_experts is not None:
        body["return_routed_experts"] = True
    if cache_key is not None:
        body["extra_key"] = cache_key
    return body


def read_completions(answer: Any, request: GenerateRequest, known_versions: Collection[int]) -> list[Completion]:
    """The completions of one answer, in sample order.

    Args:
        known_versions: that may have generated a token of it.

    Raises:
        ServerError: the answer is not one to this request, or the server gave it up.
        OutdatedWeightsError: other weights than the known ones took part.
        RuntimeError: log-probabilities are not finite.
    """
    results = answer if isinstance(answer, list) else [answer]
    if len(results) != len(request.seeds):
        raise ServerError(f"{len(results)} results for {len(request.seeds)} samples of prompt {request.index}")
    try:
        return [read_completion(result, request, known_versions) for result in results]
    except ANSWER_FAULTS as error:
        raise ServerError(
            f"the answer to prompt {request.index} is not one of /generate ({type(error).__name__}: {error})"
        ) from error


def check_versions(request: GenerateRequest, versions: Iterable[str], known_versions: Collection[int]) -> None:
    """Raises OutdatedWeightsError unless ``versions`` are known ones."""
    strange = set(versions) - set(map(str, known_versions))
    if strange:
        raise OutdatedWeightsError(
            f"prompt {request.index} was answered by weights {sorted(strange)}, expected {sorted(known_versions)}"
        )


def read_completion(result: Mapping[str, Any], request: GenerateRequest, known_versions: Collection[int]) -> Completion:
    """One sample of an answer; see `read_completions`. What is not an answer raises one of ANSWER_FAULTS, too."""
    meta = result["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] not in ("stop", "length"):
        raise ServerError(f"prompt {request.index}: the server aborted it: {reason.get('message') or reason}")
    tokens, triples = [int(token) for token in result["output_ids"]], meta["output_token_logprobs"]
    if not tokens or [int(token) for _, token, *_ in triples] != tokens:
        raise ServerError(f"prompt {request.index}: {len(tokens)} tokens, but log-probabilities of other tokens")
    if len(tokens) > request.params.max_tokens:
        raise ServerError(f"prompt {request.index}: {len(tokens)} tokens, at most {request.params.max_tokens} wanted")
    if request.vocab is not None and not 0 <= min(tokens) <= max(tokens) < request.vocab:
        strange = next(token for token in tokens if not 0 <= token < request.vocab)
        raise ServerError(f"prompt {request.index}: token {strange}, outside the vocabulary of {request.vocab}")
    spans = _spans(meta, len(tokens))
    check_versions(request, (version for version, _ in spans), known_versions)
    length, stopped = _cut(tokens, request)
    logprobs = [math.nan if triple[0] is None else float(triple[0]) for triple in triples[:length]]
    if not all(map(math.isfinite, logprobs)):
        raise RuntimeError(
            f"prompt {request.index}: log-probabilities are not finite, so the weights of version {spans[-1][0]} give "
            f"NaN or infinite logits: look at the last update's loss and gradient norm"
        )
    if max(logprobs) > ROUNDING:
        raise ServerError(f"prompt {request.index}: log-probability {max(logprobs):g}, which is above 0")
    kept = shorten([(int(version), count) for version, count in spans], length)
    finish: FinishReason = "stop" if stopped or reason["type"] == "stop" else "length"
    return Completion(tokens[:length], logprobs, finish, kept[-1][0], kept, _metadata(meta, request, length))


def _spans(meta: Mapping[str, Any], length: int) -> list[tuple[str, int]]:
    """(version, token count) runs that cover all tokens."""
    if "weight_versions" not in meta:
        return [(str(meta["weight_version"]), length)]
    spans = [(str(span["version"]), int(span["end"]) - int(span["start"])) for span in meta["weight_versions"]]
    if sum(count for _, count in spans) != length:
        raise ValueError(f"weight_versions {spans} do not cover {length} tokens")
    return spans


def _cut(tokens: Sequence[int], request: GenerateRequest) -> tuple[int, bool]:
    """How many tokens count, and whether a stop token ended them. A server asked to ignore_eos ignores stop_token_ids
    too, and goes on behind them."""
    stops = request.stop_token_ids
    first = next((position for position, token in enumerate(tokens) if token in stops), None)
    return (len(tokens), False) if first is None else (first + 1, True)


def shorten(spans: Sequence[tuple[T, int]], length: int) -> list[tuple[T, int]]:
    """(version, token count) runs of the first ``length`` tokens; neighbours of one version are one run."""
    of_tokens = itertools.islice((version for version, count in spans for _ in range(count)), length)
    return [(version, len(list(run))) for version, run in itertools.groupby(of_tokens)]


def _metadata(meta: Mapping[str, Any], request: GenerateRequest, length: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    matched = meta["finish_reason"].get("matched")
    if isinstance(matched, str):
        found["stop"] = matched
    if request.routed_experts is not None:
        values = numpy.frombuffer(base64.b64decode(meta["routed_experts"]), dtype=numpy.int32)
        routed = values.reshape(-1, *request.routed_experts)
        # One row for each token that was fed to the model: all but the last one generated.
        found["routed_experts"] = routed[: len(request.token_ids) + length - 1].copy()
    return found
