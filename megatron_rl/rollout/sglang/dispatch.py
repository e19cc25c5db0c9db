"""`Dispatcher`: every request is answered exactly once, by one of the servers.

A request is one coroutine that tries one server at a time and takes the first whole answer; so it can neither be lost
nor counted twice, whatever servers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Callable, Sequence

from megatron_rl.rollout.base import Completion
from megatron_rl.rollout.sglang.client import RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.generation import OutdatedWeightsError, Request, read_completions, request_body
from megatron_rl.rollout.sglang.membership import Member, Membership
from megatron_rl.rollout.sglang.routing import State, choose

logger = logging.getLogger(__name__)

Emit = Callable[[int, list[Completion]], None]  # (prompt, its completions)


class Dispatcher:
    """Routes and retries; runs on the membership's event loop.

    Args:
        separate_caches: give each version of the weights prefixes of its own, where a server's cache survives updates.
    """

    def __init__(self, membership: Membership, separate_caches: bool) -> None:
        self.membership, self.separate_caches = membership, separate_caches
        self._chores: set[asyncio.Task[None]] = set()

    async def answer_all(self, requests: Sequence[Request], emit: Emit) -> None:
        """Answer every request; ``emit`` is called once for each, in any order.

        Raises:
            RuntimeError: a request failed on every attempt, or no server came back in time.
            ValueError: a server refused a request as wrong.
        """
        async with self.membership.watched() as watch:
            work = asyncio.create_task(self._answer_all(requests, emit))
            try:
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                await (work if work.done() else watch)
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _answer_all(self, requests: Sequence[Request], emit: Emit) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(self._answer(request, emit))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _answer(self, request: Request, emit: Emit) -> None:
        patience, failed_on = self.membership.patience, list[Member]()
        pause = patience.first_pause
        for attempt in range(1, patience.attempts + 1):
            member = await self._acquire(len(request.seeds), failed_on)
            try:
                completions = await self._attempt(member, request)
            except ServerError as error:
                failed_on.append(member)
                logger.warning("attempt %d on prompt %d failed: %s", attempt, request.index, error)
                if attempt == patience.attempts:
                    raise RuntimeError(
                        f"prompt {request.index} was not answered in {attempt} attempts, the last one: {error}"
                    ) from error
            else:
                emit(request.index, completions)
                return
            finally:
                member.load -= len(request.seeds)
                await self.membership.notify(2)  # requests are of one size, mostly; waking all would be quadratic
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, patience.longest_pause)

    async def _acquire(self, sequences: int, failed_on: Sequence[Member]) -> Member:
        """Wait for a server with room and take it."""
        membership, patience = self.membership, self.membership.patience.recovery
        while True:
            found = choose(membership.members, sequences, failed_on) if membership.serving else None
            if found is not None:
                found.load += sequences
                return found
            try:
                async with membership.changed:
                    await asyncio.wait_for(membership.changed.wait(), patience)
            except TimeoutError:
                if membership.serving and not membership.of(State.READY):
                    raise RuntimeError(f"no server was ready for {patience:.0f} s: {membership.describe()}") from None

    async def _attempt(self, member: Member, request: Request) -> list[Completion]:
        """One try on one server. What is left of it there when it fails is aborted, and the server is looked at."""
        membership, client = self.membership, member.client
        begun = len(membership.versions) - 1
        request_ids = [uuid.uuid4().hex for _ in request.seeds]
        cache_key = f"weights-{membership.version}" if self.separate_caches else None
        work = asyncio.create_task(client.generate(request_body(request, request_ids, cache_key)))
        given_up = asyncio.create_task(member.given_up.wait())
        try:
            await asyncio.wait({work, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ServerError(f"{client.url} was given up while prompt {request.index} ran there")
            return read_completions(work.result(), request, membership.versions[begun:])
        except OutdatedWeightsError as error:
            member.held = None
            await membership.mark(member, State.OUTDATED, str(error))
            raise
        except ServerError as error:
            if member.state is State.READY:
                await membership.mark(member, State.DOWN, str(error))  # until it is known to be well
                await membership.examine(member)
            self._chore(client, request_ids)
            raise
        finally:
            given_up.cancel()
            if not work.done():
                work.cancel()
                self._chore(client, request_ids)

    def _chore(self, client: SGLangClient, request_ids: Sequence[str]) -> None:
        """Abort requests on the side; the server may be gone."""

        async def abort() -> None:
            with contextlib.suppress(ServerError, RequestError, RuntimeError):
                await client.abort(request_ids)

        task = asyncio.create_task(abort())
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
