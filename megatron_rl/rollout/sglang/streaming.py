"""`StreamedAnswer`: the samples of one prompt, received token by token, so that tokens outlive their server.

An answer that comes whole is lost with its server, however long it took. A streamed one is continued: the next
server gets the prompt and the tokens so far and generates the rest, and the sample says which weights made which.

    Draft: kept tokens (of servers that are gone) + piece (of the one at work) --finished--> Completion
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.rollout.base import Completion
from megatron_rl.rollout.sglang.generation import (
    ANSWER_FAULTS,
    GenerateRequest,
    check_versions,
    read_completion,
    request_body,
    shorten,
)
from megatron_rl.rollout.sglang.sglang_client import Json, RequestError, ServerError, SGLangClient

logger = logging.getLogger(__name__)

KnownVersions = Callable[[], Collection[int]]  # that may have generated a token of the answer, as of now


@dataclass
class PartialOutput:
    """What one server has sent of one sample."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    meta: Json = field(default_factory=dict)  # of the last chunk
    version: str = ""  # of the weights when the first chunk came
    certain: int = 0  # leading tokens that those weights are known to have made
    updated: bool = False  # a chunk came with other weights

    def take(self, chunk: Json) -> None:
        """Add a chunk: the tokens since the last one or, from servers without incremental-streaming-output, all."""
        meta = chunk["meta_info"]
        total, version = int(meta["completion_tokens"]), str(meta["weight_version"])
        self.tokens = _grown(self.tokens, [int(token) for token in chunk["output_ids"]], total)
        self.logprobs = _grown(self.logprobs, meta["output_token_logprobs"], total)
        self.meta, self.version = meta, self.version or version
        self.updated = self.updated or version != self.version
        # The first chunk after an update may begin with tokens of before it; only the last chunk says how many.
        self.certain = self.certain if self.updated else total

    def spans(self) -> list[tuple[str, int]]:
        """(version, token count) runs of the tokens that are certain; of all when the server has ended the piece."""
        if "weight_versions" in self.meta:
            spans = self.meta["weight_versions"]
            return [(str(span["version"]), int(span["end"]) - int(span["start"])) for span in spans]
        return [(self.version, self.certain)] if self.certain else []


@dataclass
class Draft:
    """One sample as far as it has come."""

    tokens: list[int] = field(default_factory=list)  # kept
    logprobs: list[Any] = field(default_factory=list)  # theirs, as the server's triples
    spans: list[tuple[str, int]] = field(default_factory=list)  # theirs: (version, token count) runs
    partial: PartialOutput = field(default_factory=PartialOutput)
    completion: Completion | None = None

    def keep(self, most: int) -> None:
        """Put what is certain of the piece behind the kept tokens, ``most`` in all; the next piece begins."""
        spans = self.partial.spans()
        count = min(sum(tokens for _, tokens in spans), most - len(self.tokens))
        self.tokens += self.partial.tokens[:count]
        self.logprobs += self.partial.logprobs[:count]
        self.spans = shorten(self.spans + spans, len(self.tokens))
        self.partial = PartialOutput()

    def result(self, finish_reason: Json) -> Json:
        """All tokens so far, as one result of /generate."""
        spans, end = [], 0
        for version, count in self.spans + self.partial.spans():
            spans.append({"version": version, "start": end, "end": end + count})
            end += count
        meta = {"finish_reason": finish_reason, "weight_versions": spans}
        meta["output_token_logprobs"] = self.logprobs + self.partial.logprobs
        return {"output_ids": self.tokens + self.partial.tokens, "meta_info": self.partial.meta | meta}


class StreamedAnswer:
    """One request over as many servers as it takes."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.drafts = [Draft() for _ in request.seeds]
        self._known: set[int] = set()
        # Without its last tokens a server would not see a stop text that they begin, and without its end there are no
        # routed experts: then the whole is asked for anew, or at least the last token.
        self._most = 0 if request.params.stop else request.params.max_tokens - bool(request.routed_experts)

    async def ask(
        self, client: SGLangClient, request_ids: Sequence[str], cache_key: str | None, known: KnownVersions
    ) -> list[Completion]:
        """Have one server generate what is still missing. When that fails, what came is kept for the next.

        Raises:
            ServerError: it failed.
            OutdatedWeightsError: it generated with other weights than the known ones.
        """
        rest = [i for i, draft in enumerate(self.drafts) if draft.completion is None]
        if not rest:
            return self._completions()
        drafts = [self.drafts[i] for i in rest]
        body = self._body(rest, [request_ids[i] for i in rest], cache_key)
        try:
            async with aclosing(client.stream(body, self.request.max_bytes)) as chunks:
                async for chunk in chunks:
                    self._take(drafts, chunk, known)
            return self._completions()
        finally:
            for draft in drafts:
                draft.keep(self._most)
            self._complete()

    def _body(self, rest: Sequence[int], request_ids: Sequence[str], cache_key: str | None) -> Json:
        whole = request_body(self.request, request_ids, cache_key)
        kept = [self.drafts[i].tokens for i in rest]
        if any(kept):
            logger.warning("prompt %d resumes after %d streamed tokens", self.request.index, sum(map(len, kept)))
        params = [whole["sampling_params"][i] for i in rest]
        return whole | {
            "stream": True,
            "input_ids": [[*self.request.token_ids, *tokens] for tokens in kept],
            "sampling_params": [
                one | {"max_new_tokens": self.request.params.max_tokens - len(tokens)}
                for one, tokens in zip(params, kept, strict=True)
            ],
        }

    def _take(self, drafts: Sequence[Draft], chunk: Json, known: KnownVersions) -> None:
        draft = None
        try:
            if "error" not in chunk:
                draft = drafts[chunk.get("index", 0)]
                given_up = self._add(draft, chunk["meta_info"]["finish_reason"], chunk, known)
            else:
                given_up = {"status_code": chunk["error"]["code"], "message": chunk["error"]["message"]}
        except (ServerError, *ANSWER_FAULTS) as error:
            if draft is not None:
                draft.partial = PartialOutput()  # not usable
            if isinstance(error, ServerError):
                raise
            raise ServerError(
                f"what streamed for prompt {self.request.index} is not of /generate ({type(error).__name__}: {error})"
            ) from error
        if given_up is not None:
            status = given_up.get("status_code")
            text = f"prompt {self.request.index}: the server aborted it: {given_up.get('message') or given_up}"
            raise RequestError(text) if status is not None and 400 <= status < 500 else ServerError(text)

    def _add(self, draft: Draft, reason: Json | None, chunk: Json, known: KnownVersions) -> Json | None:
        """The reason why the server gave the sample up, if it did."""
        draft.partial.take(chunk)
        if len(draft.tokens) + len(draft.partial.tokens) > self.request.params.max_tokens:
            raise ValueError(f"more than the {self.request.params.max_tokens} tokens wanted")
        self._known.update(known())
        versions = {str(chunk["meta_info"]["weight_version"]), *(version for version, _ in draft.partial.spans())}
        check_versions(self.request, versions, self._known)
        if reason is None:
            return None
        if reason["type"] not in ("stop", "length"):
            return reason
        draft.completion = read_completion(draft.result(reason), self.request, self._known)
        return None

    def _complete(self) -> None:
        """Samples whose end was in what came, though the server did not come to say so."""
        for draft in self.drafts:
            ended = len(draft.tokens) == self.request.params.max_tokens
            ended = ended or not self.request.stop_token_ids.isdisjoint(draft.tokens)
            if draft.completion is None and ended and self.request.routed_experts is None:
                draft.completion = read_completion(draft.result({"type": "length"}), self.request, self._known)

    def _completions(self) -> list[Completion]:
        found = [draft.completion for draft in self.drafts if draft.completion is not None]
        if len(found) < len(self.drafts):
            missing = len(self.drafts) - len(found)
            raise ServerError(f"prompt {self.request.index}: the stream ended before {missing} samples did")
        return found


def _grown(have: list[Any], came: Sequence[Any], total: int) -> list[Any]:
    """``came`` are the next items or, where there are as many as there should be in all, all of them."""
    grown = list(came[:total]) if len(came) >= total else have + list(came)
    if len(grown) != total:
        raise ValueError(f"{len(grown)} tokens were streamed, expected {total}")
    return grown
