"""`Membership`: which servers a replica has, which of them serve, and how one that failed comes back.

It checks the health of servers that work on requests, restarts those it owns, pauses them for a weight update and
resumes them.
Everything here runs on one event loop; there are no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.rollout.sglang.routing import RoutedServer, State
from megatron_rl.rollout.sglang.server import ServerStartError, SGLangServer
from megatron_rl.rollout.sglang.sglang_client import (
    Json,
    PauseMode,
    RequestError,
    ServerError,
    SGLangClient,
    check_version,
)
from megatron_rl.rollout.sglang.weight_transfer import ServerLayout

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0  # between checks of servers that are down
FIRST_LOG_SECONDS, LOG_SECONDS = 2.0, 30.0  # of waiting for servers before it is logged, and between such lines
FAILED_HEALTH_CHECKS = 2  # in a row, that give a server's requests up


@dataclass(frozen=True)
class RetryPolicy:
    """When and how often something is tried again; times in seconds."""

    attempts: int = 8  # of one request, over all servers
    first_pause: float = 0.25  # before the second attempt; doubles up to `longest_pause`
    longest_pause: float = 10.0
    health_interval: float = 30.0  # between health checks of a server that has requests
    health_timeout: float = 60.0
    recovery: float = 900.0  # that everything waits for a server when none is ready
    restarts: int = 3  # of one owned server between two updates


@dataclass(eq=False)
class Member(RoutedServer):
    """One server: what the router knows, how to talk to it, and the process where it is ours."""

    client: SGLangClient = field(kw_only=True)
    server: SGLangServer | None = field(default=None, kw_only=True)
    make_client: Callable[[str], SGLangClient] | None = field(default=None, kw_only=True)  # after a restart
    given_up: asyncio.Event = field(default_factory=asyncio.Event, kw_only=True)  # its running requests
    held: int | None = field(default=None, kw_only=True)  # version of its weights; None = unknown, or a mixture
    restarts: int = field(default=0, kw_only=True)
    health_failures: int = field(default=0, kw_only=True)


class Membership:
    """The servers of one replica. The conditions of `changed` are states, loads and `serving`."""

    def __init__(
        self, members: Sequence[Member], retry_policy: RetryPolicy, layout: ServerLayout, runs_loader: bool = False
    ) -> None:
        self.members, self.retry_policy = list(members), retry_policy
        self._layout, self._runs_loader = layout, runs_loader
        self.versions: list[int] = []  # committed so far; the last one is served
        self.serving = False  # False from `stop` to `serve`
        self._watching: asyncio.Task[None] | None = None
        self._inside = 0  # calls of `watched` under way
        self.changed = asyncio.Condition()

    @property
    def version(self) -> int:
        return self.versions[-1]

    def of(self, *states: State) -> list[Member]:
        return [member for member in self.members if member.state in states]

    async def mark(self, member: Member, state: State, why: str = "") -> None:
        """Move a member to ``state`` and wake those who wait for a change."""
        if why:
            member.failures.append(why)
        if state is not member.state:
            logger.log(logging.WARNING if why else logging.DEBUG, "%s is %s. %s", member.name, state.value, why)
        member.state = state
        await self.notify()

    async def notify(self, waiters: int | None = None) -> None:
        """Wake ``waiters`` of those who wait for a change; None = all."""
        async with self.changed:
            self.changed.notify_all() if waiters is None else self.changed.notify(waiters)

    # --- failing and coming back -----------------------------------------------------------------------------------

    async def examine(self, member: Member) -> None:
        """Determine the state of a member that may not be working: down, outdated, or ready after all.

        Raises:
            ConfigError: it is not a server that the replica can use.
        """
        try:
            if member.state is State.DOWN:
                self._verify(member, await member.client.server_info())
            held = await member.client.weight_version()
            current = bool(self.versions) and held == str(self.version) and self.serving
            if current:
                await member.client.resume()  # it may have been lost before it was resumed after an update
        except (ServerError, RequestError) as error:
            await self.mark(member, State.DOWN, str(error) if member.state is not State.DOWN else "")
            return
        member.held = self.version if current else None
        await self.mark(member, State.READY if current else State.OUTDATED)

    def _verify(self, member: Member, info: Json) -> None:
        check_version(str(info.get("version")), member.client.url)
        self._layout.check(info, member.client.url, self._runs_loader)

    async def bring_back(self, member: Member) -> None:
        """One attempt to bring a member back that is down; a server of ours that has ended is started again.

        Raises:
            RuntimeError: no member is left that could come back.
        """
        server = member.server
        if server is not None and not server.is_running:
            never_served = not self.versions and not server.lost_its_port
            if never_served or all(map(self._is_hopeless, self.members)):
                raise ServerStartError(server, f"SGLang ended ({self.describe()})")
            if self._is_hopeless(member):
                return
            member.restarts += 1
            logger.warning("%s has ended; starting it again (%d)", member.name, member.restarts)
            await member.client.close()
            await asyncio.to_thread(server.launch)
            assert member.make_client is not None
            member.client = member.make_client(server.url)
        await self.examine(member)

    def _is_hopeless(self, member: Member) -> bool:
        ended = member.server is not None and not member.server.is_running
        return ended and member.restarts >= self.retry_policy.restarts

    async def wait_for_servers(self, timeout: float) -> None:
        """Wait for servers that are starting, and for at least one server.

        Raises:
            RuntimeError: none answers within ``timeout`` seconds, or one of ours does not start.
        """
        clock = asyncio.get_running_loop().time
        deadline, next_log = clock() + timeout, clock() + FIRST_LOG_SECONDS
        while True:
            for member in self.of(State.DOWN):
                await self.bring_back(member)
            starting = [m for m in self.of(State.DOWN) if m.server is not None and not self._is_hopeless(m)]
            if not starting and len(self.of(State.DOWN)) < len(self.members):
                return
            if clock() > deadline:
                raise RuntimeError(f"servers did not answer within {timeout:.0f} s: {self.describe()}")
            if clock() > next_log:
                level = logging.INFO if starting else logging.WARNING  # nothing here starts the others
                logger.log(level, "waiting up to %.0f s more for servers: %s", deadline - clock(), self.describe())
                next_log = clock() + LOG_SECONDS
            await asyncio.sleep(WATCH_SECONDS)

    async def serve(self, members: Sequence[Member]) -> None:
        """Let ``members``, which hold the version committed last, serve it."""
        await self.resume(members)
        self.serving = True
        await self.notify()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[asyncio.Task[None]]:
        """While anyone is inside, members that are down are brought back, and the health of those with requests is
        checked, by one task for all. It ends only with an error."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        task = self._watching
        self._inside += 1
        try:
            yield task
        finally:
            self._inside -= 1
            if self._inside == 0:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        looked = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for member in self.of(State.DOWN):
                await self.bring_back(member)
            now = asyncio.get_running_loop().time()
            if self.serving and now - looked >= self.retry_policy.health_interval:
                await asyncio.gather(*(self._check_health(m) for m in self.of(State.READY) if m.load))
                looked = asyncio.get_running_loop().time()

    async def _check_health(self, member: Member) -> None:
        try:
            await member.client.check_health(self.retry_policy.health_timeout)
            member.health_failures = 0
        except (ServerError, RequestError) as error:
            member.health_failures += 1
            if self.serving and member.health_failures >= FAILED_HEALTH_CHECKS:
                await self.give_up(member, f"it fails its health checks: {error}")

    async def give_up(self, member: Member, why: str) -> None:
        """Take a member out; its requests go elsewhere. A server of ours that hangs is ended, to be started anew."""
        member.given_up.set()
        member.given_up, member.health_failures = asyncio.Event(), 0
        await self.mark(member, State.DOWN, why)
        if member.server is not None:
            await asyncio.to_thread(member.server.close)

    def describe(self) -> str:
        return "; ".join(map(str, self.members))

    # --- weight updates --------------------------------------------------------------------------------------------

    async def stop(self, members: Sequence[Member], mode: PauseMode) -> None:
        """Pause generation on ``members``, which are outdated from then on; those that cannot are down."""

        async def stop(client: SGLangClient) -> None:
            await client.pause(mode)
            if mode != "in_place":  # then requests keep their cache, and a cache key keeps later ones away from it
                await client.flush_cache()

        await self.each(members, stop, State.OUTDATED)

    def unchanged(self) -> list[Member]:
        """Paused members that hold the version committed last, whole."""
        return [member for member in self.of(State.OUTDATED) if self.versions and member.held == self.version]

    async def resume(self, members: Sequence[Member]) -> None:
        """Let ``members``, which hold the version committed last, serve it."""
        name = str(self.version)
        for member in members:
            member.held, member.restarts = self.version, 0

        async def resume(client: SGLangClient) -> None:
            await client.set_weight_version(name)
            await client.resume()

        await self.each(members, resume, State.READY)

    async def each(
        self,
        members: Sequence[Member],
        action: Callable[[SGLangClient], Coroutine[Any, Any, None]],
        after: State = State.OUTDATED,
    ) -> None:
        """Do one thing to all ``members`` at once; those it works on are ``after`` then, the others down."""

        async def one(member: Member) -> None:
            try:
                await action(member.client)
            except (ServerError, RequestError) as error:
                await self.mark(member, State.DOWN, str(error))
            else:
                await self.mark(member, after)

        await asyncio.gather(*map(one, members))
