"""`Dispatcher`: every request is answered exactly once, by one of the servers.

A request is one coroutine that tries one server at a time and takes the first whole answer; so it can neither be lost
nor counted twice, whatever servers do. What ends without its answer is aborted on its server, by its name, whether the
caller was interrupted, another request failed or the engine is closed: no server generates tokens that nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from megatron_rl.rollout.base import Completion, Progress
from megatron_rl.rollout.sglang.event_loop import together
from megatron_rl.rollout.sglang.generation import GenerateRequest, OutdatedWeightsError, read_completions, request_body
from megatron_rl.rollout.sglang.membership import Member, Membership
from megatron_rl.rollout.sglang.routing import State, choose
from megatron_rl.rollout.sglang.sglang_client import ABORT_SECONDS, RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.streaming import KnownVersions, StreamedAnswer

logger = logging.getLogger(__name__)


class Dispatcher:
    """Routes and retries; runs on the membership's event loop.

    Args:
        separate_caches: give each version of the weights prefixes of its own, where a server's cache survives updates.
        stream: keep the tokens of a server that fails, see `streaming`.
    """

    def __init__(self, membership: Membership, separate_caches: bool, stream: bool = False) -> None:
        self.membership, self.separate_caches, self.stream = membership, separate_caches, stream
        self._calls: set[asyncio.Task[None]] = set()  # of `all_of`
        self._aborts: set[asyncio.Task[None]] = set()

    async def answer_all(
        self, requests: Sequence[GenerateRequest], results: dict[int, list[Completion]], progress: Progress | None
    ) -> None:
        """Answer every request, in any order, into ``results`` by its index; ``progress`` is called with completions.

        Raises:
            RuntimeError: a request failed on every attempt, or no server came back in time.
            ValueError: a server refused a request as wrong.
        """

        async def answer(request: GenerateRequest) -> None:
            completions = await self.answer(request)
            assert request.index not in results, f"prompt {request.index} was answered twice"
            results[request.index] = completions
            if progress is not None:
                progress(len(results) * len(request.seeds), len(requests) * len(request.seeds))

        await self.all_of([answer(request) for request in requests])

    async def answer_alone(self, request: GenerateRequest) -> list[Completion]:
        """As `answer_all`, of one request.

        Raises:
            RuntimeError, ValueError: likewise.
        """
        results: dict[int, list[Completion]] = {}
        await self.answer_all([request], results, None)
        return results[request.index]

    async def all_of(self, coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
        """Run coroutines that call `answer`, while servers are watched; the first error cancels the others.

        Raises:
            Exception: as `answer_all`, or what a coroutine raises by itself.
        """
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            async with self.membership.watched() as watch:
                work = asyncio.create_task(together(coroutines))
                try:
                    await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                    await (work if work.done() else watch)
                finally:
                    work.cancel()
                    await asyncio.gather(work, return_exceptions=True)
        except BaseException:
            if self._aborts:  # of the requests that ran
                await asyncio.wait(self._aborts, timeout=ABORT_SECONDS)
            raise
        finally:
            self._calls.discard(call)

    async def end(self) -> None:
        """End all calls of `all_of`, as `settled` says. Cancelling everything that runs instead would cancel HTTP
        requests twice, whose connections are then never given back, and the aborts would wait for them."""
        for call in self._calls:
            call.cancel()
        await self.settled()

    async def settled(self) -> None:
        """Return when calls of `all_of` that were cancelled have ended and their requests are aborted."""
        ending = {call for call in self._calls if call.cancelling()}
        if ending:
            await asyncio.wait(ending, timeout=2 * ABORT_SECONDS)

    async def answer(self, request: GenerateRequest) -> list[Completion]:
        """One request's answer; inside `all_of`."""
        retry_policy, failed_on = self.membership.retry_policy, list[Member]()
        streamed = StreamedAnswer(request) if self.stream else None
        pause = retry_policy.first_pause
        for attempt in range(1, retry_policy.attempts + 1):
            member = await self._acquire(len(request.seeds), failed_on)
            try:
                return await self._attempt(member, request, streamed)
            except ServerError as error:
                failed_on.append(member)
                logger.warning("attempt %d on prompt %d failed: %s", attempt, request.index, error)
                if attempt == retry_policy.attempts:
                    raise RuntimeError(
                        f"prompt {request.index} was not answered in {attempt} attempts, the last one: {error}"
                    ) from error
            finally:
                member.load -= len(request.seeds)
                await self.membership.notify(2)  # requests are of one size, mostly; waking all would be quadratic
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, retry_policy.longest_pause)
        raise AssertionError("the last attempt returns or raises")

    async def _acquire(self, sequences: int, failed_on: Sequence[Member]) -> Member:
        """Wait for a server with room and take it."""
        membership, timeout = self.membership, self.membership.retry_policy.recovery
        while True:
            found = choose(membership.members, sequences, failed_on) if membership.serving else None
            if found is not None:
                found.load += sequences
                return found
            try:
                async with membership.changed:
                    await asyncio.wait_for(membership.changed.wait(), timeout)
            except TimeoutError:
                if membership.serving and not membership.of(State.READY):
                    raise RuntimeError(f"no server was ready for {timeout:.0f} s: {membership.describe()}") from None

    async def _attempt(
        self, member: Member, request: GenerateRequest, streamed: StreamedAnswer | None
    ) -> list[Completion]:
        """One attempt on one server. When it fails, it is aborted there and the state of the server is determined."""
        membership, client = self.membership, member.client
        begun = len(membership.versions) - 1
        request_ids = [uuid.uuid4().hex for _ in request.seeds]
        cache_key = f"weights-{membership.version}" if self.separate_caches else None

        def known() -> list[int]:
            return membership.versions[begun:]

        if streamed is None:
            work = asyncio.create_task(_ask(client, request, request_ids, cache_key, known))
        else:
            work = asyncio.create_task(streamed.ask(client, request_ids, cache_key, known))
        given_up = asyncio.create_task(member.given_up.wait())
        try:
            await asyncio.wait({work, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ServerError(f"{client.url} was abandoned while prompt {request.index} ran there")
            completions = work.result()
            request_ids = []  # nothing to abort
            return completions
        except OutdatedWeightsError as error:
            member.held = None
            await membership.mark(member, State.OUTDATED, str(error))
            raise
        except ServerError as error:
            if member.state is State.READY:
                await membership.mark(member, State.DOWN, str(error))  # until it is known to work
                await membership.examine(member)
            raise
        finally:
            given_up.cancel()
            work.cancel()
            if request_ids:  # before any await: a second cancellation would end this coroutine there
                self._abort(client, request_ids)
            await asyncio.wait({work})  # what had come is kept by then

    def _abort(self, client: SGLangClient, request_ids: Sequence[str]) -> None:
        """In the background; the server may be gone."""

        async def abort() -> None:
            with contextlib.suppress(ServerError, RequestError, RuntimeError):
                await client.abort(request_ids)

        task = asyncio.create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)


async def _ask(
    client: SGLangClient,
    request: GenerateRequest,
    request_ids: Sequence[str],
    cache_key: str | None,
    known: KnownVersions,
) -> list[Completion]:
    """The answer of one server, in one piece."""
    answer = await client.generate(request_body(request, request_ids, cache_key), request.max_bytes)
    return read_completions(answer, request, known())
