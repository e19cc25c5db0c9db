"""`SGLangEngine`: generation on SGLang servers, which one rollout replica owns or is attached to.

The replica's first rank talks to the servers; its other ranks bring their shards when weights are delivered. All of
them call everything together. The weights of a server that was unreachable are unknown: it
gets the newest ones again before it gets a request.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import tempfile
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture
from megatron_rl.reshard import Layout
from megatron_rl.rollout.admission import TAGS, check_prompts, check_shards, check_tags
from megatron_rl.rollout.base import (
    ENGINES,
    Completion,
    Conversation,
    Progress,
    RolloutEngine,
    SamplingParams,
    ServersLostError,
    WeightCheck,
    sample_seed,
)
from megatron_rl.rollout.gate import UpdateGate
from megatron_rl.rollout.sglang.conversing import hold
from megatron_rl.rollout.sglang.dispatcher import Dispatcher
from megatron_rl.rollout.sglang.event_loop import EventLoop
from megatron_rl.rollout.sglang.generation import GenerateRequest
from megatron_rl.rollout.sglang.launch_servers import launch_servers
from megatron_rl.rollout.sglang.membership import Member, Membership
from megatron_rl.rollout.sglang.model_folder import (
    check_layers,
    check_served,
    delivery_of,
    explained_start,
    write_model_folder,
)
from megatron_rl.rollout.sglang.replica import Replica
from megatron_rl.rollout.sglang.routing import State
from megatron_rl.rollout.sglang.server import server_python
from megatron_rl.rollout.sglang.sglang_config import SGLangConfig
from megatron_rl.rollout.sglang.verification import check_members
from megatron_rl.rollout.sglang.weight_transfer import TRANSFERS, ServerLayout

logger = logging.getLogger(__name__)

WHERE = "actor.rollout.options"
POLL_SECONDS = 0.25  # between checks for servers that need weights, while requests run
CALL_SECONDS = 20.0  # between heartbeats to the other ranks, whose collectives time out
WRITE_ATTEMPTS = 3


@ENGINES.register("sglang")
class SGLangEngine(RolloutEngine):
    """One rank's handle of its replica's servers.

    Args:
        architecture, layout, rank, dtype, eos_token_ids, tokenizer, device: as for `LocalEngine`.
        tp_group: the ranks of this replica; None = this rank alone.
        max_running: sequences that one server runs at a time.
        options: `SGLangConfig` by name.

    Raises:
        ConfigError: options are wrong, or the servers would hold another layout.
    """

    streams = recomputes = True

    def __init__(
        self,
        architecture: Architecture,
        layout: Layout,
        rank: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        *,
        tp_group: dist.ProcessGroup | None = None,
        eos_token_ids: Iterable[int] = (),
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        max_running: int = 256,
        **options: Any,
    ) -> None:
        self.config = SGLangConfig.parse(options, where=WHERE)
        self.check_model(architecture)
        self.architecture, self._layout, self.rank = architecture, layout, rank
        self.eos_token_ids, self.tokenizer = frozenset(eos_token_ids), tokenizer
        self.max_context = self.config.server.context_length or architecture.max_positions
        check_served(architecture, self.max_context)
        delivery = delivery_of(architecture, self.config.delivery)
        self.replica = Replica.of(layout, rank, tp_group, device)
        self._gate, self._asleep = UpdateGate(), set[str]()
        self._shards: Mapping[str, torch.Tensor] = {}  # the caller's, of `load_shards`
        self._shapes = {shard.name: shard.shape for shard in layout.shards(rank)}
        self._written: list[Member] | None = None  # by the update under way, once it has begun to write
        self._closing = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="megatron_rl-sglang-")
        self._loop = EventLoop()
        name = str(dtype).removeprefix("torch.")
        members, expected = [], ServerLayout.of(layout, dtype)
        if self.replica.leads:
            folder = write_model_folder(Path(self._folder.name), architecture, tokenizer, name)
            sizes = (name, max_running, torch.device(device), tokenizer, expected.ep)
            members = launch_servers(self.config, self.replica, folder, architecture, *sizes)
        self._transfer = TRANSFERS[delivery](
            loop=self._loop,
            architecture=architecture,
            layout=layout,
            rank=rank,
            dtype=dtype,
            tp_group=tp_group,
            device=device,
            **self.config.delivery_options,
        )
        self._membership = Membership(members, self.config.retry_policy, expected, self._transfer.runs_loader)
        self._dispatcher = Dispatcher(self._membership, self.config.pause == "in_place", self.config.stream)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        config = SGLangConfig.parse(options, where=WHERE)
        if config.delivery not in (None, *TRANSFERS):
            raise ConfigError(f"{WHERE}.delivery={config.delivery!r} is not one of {list(TRANSFERS)}")
        if not config.urls:
            server_python(config.server)

    @classmethod
    def check_model(cls, architecture: Architecture) -> None:
        check_layers(architecture)

    @classmethod
    def context(cls, options: Mapping[str, Any], max_positions: int) -> int:
        return SGLangConfig.parse(options, where=WHERE).server.context_length or max_positions

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def policy_version(self) -> int:
        return self._gate.version

    @property
    def urls(self) -> list[str]:
        """Of this replica's servers; on its first rank only."""
        return [member.client.url for member in self._membership.members]

    def targets(self) -> Mapping[str, torch.Tensor]:
        return {}

    @property
    def bucket_copies(self) -> int:  # type: ignore[override]
        return self._transfer.bucket_copies + bool(self._layout.recomputed)  # computed here too, to compare

    def new_buffer(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        return self._transfer.new_buffer(num_bytes, device)

    def begin_update(self) -> None:
        """Pause the servers that answer; the first call waits for all of them to start."""
        if "weights" in self._asleep:
            raise RuntimeError("the rollout weights sleep: call wake(['weights']) before updating them")
        self._gate.begin()
        self._shards, self._written = {}, None
        if self.replica.leads:
            self._loop.run(self._pause())

    async def _pause(self) -> None:
        membership = self._membership
        membership.serving = False
        with explained_start(self.architecture):
            await membership.wait_for_servers(self.config.start_timeout)
        await membership.stop(membership.of(State.READY, State.OUTDATED), self.config.pause)
        if not membership.of(State.OUTDATED):
            raise RuntimeError(f"no server could be paused for a weight update: {membership.describe()}")

    def write_shards(self, shards: Mapping[str, torch.Tensor], fault: str = "") -> None:
        with self._examined():
            if self._written is None:
                self._open()
            self._transfer.write(shards, fault)

    def finish_update(self) -> str:
        with self._examined():
            return self._transfer.close()

    def _open(self) -> None:
        self._written = self._membership.of(State.OUTDATED)
        for member in self._written:
            member.held = None
        self._transfer.open([member.client for member in self._written])

    @contextlib.contextmanager
    def _examined(self) -> Iterator[None]:
        """After a failure: find out which servers still answer, so that another `begin_update` starts with those."""
        try:
            yield
        except RuntimeError:
            if self.replica.leads:
                for member in self._membership.of(State.OUTDATED):
                    self._loop.run(self._membership.examine(member))
            raise

    def load_shards(self, shards: Mapping[str, torch.Tensor], version: int) -> None:
        """As every engine does. ``shards`` are kept, for servers that come back without weights, until the next update
        and must not change until then."""
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            self.begin_update()
            try:
                check_shards(shards, self._shapes)
                self._write_all(shards)
                break
            except BaseException as error:
                if attempt == WRITE_ATTEMPTS or not isinstance(error, RuntimeError):
                    self.abort_update(intact=isinstance(error, ValueError))
                    raise
                logger.warning("weights did not reach all servers; trying again", exc_info=True)
        self._shards = shards
        self.commit_update(version)

    def _write_all(self, shards: Mapping[str, torch.Tensor]) -> None:
        self._open()
        self.write_shards(shards)
        self.finish_update()

    def commit_update(self, version: int) -> None:
        self._gate.commit(version)
        if self.replica.leads:
            self._membership.versions.append(version)
            self._loop.run(self._membership.serve([m for m in self._written or () if m.state is State.OUTDATED]))

    def abort_update(self, intact: bool) -> None:
        self._gate.abort(intact)
        self._transfer.drop()
        if intact and self.replica.leads and self._membership.versions and not self._membership.serving:
            self._loop.run(self._membership.serve(self._membership.unchanged()))

    def verify_weights(self) -> WeightCheck:
        """The first rank asks the replica's servers; elsewhere, and while the engine sleeps, nothing is known."""
        if not self.replica.leads or not self._membership.versions:
            return WeightCheck()
        return self._loop.run(check_members(self._membership, self._transfer.proof))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """As every engine does; the answers are returned on the replica's first rank only, elsewhere an empty list, and
        those of `ServersLostError` likewise."""
        self._require_ready()
        seeds = range(len(prompts)) if seeds is None else seeds
        self._check(prompts, seeds, params)
        if not prompts:
            return []
        if not self.replica.leads:
            self._follow()
            return []
        requests = [self._request(i, prompts[i], params, seed) for i, seed in enumerate(seeds)]
        results: dict[int, list[Completion]] = {}
        with self.replica.calling():
            self._lead(self._dispatcher.answer_all(requests, results, progress), results)
        return [results[index] for index in range(len(prompts))]

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[concurrent.futures.Future[list[Completion]]]:
        self._require_ready()
        self._check(prompts, seeds, params)
        requests = [self._request(i, prompts[i], params, seed) for i, seed in enumerate(seeds) if self.replica.leads]
        return [self._loop.submit(self._dispatcher.answer_alone(request)) for request in requests]

    def converse(self, conversations: Sequence[Conversation[Any]], params: SamplingParams) -> list[Any]:
        self._require_ready()
        if not self.replica.leads:
            self._follow()
            return []
        results: dict[int, list[Any]] = {}

        def request_of(number: int, token_ids: Sequence[int], max_tokens: int, seed: int) -> GenerateRequest:
            own = params.model_copy(update={"n": 1, "max_tokens": max_tokens})
            self._check([token_ids], [seed], own)
            return self._request(number, token_ids, own, seed)

        with self.replica.calling():
            self._lead(hold(self._dispatcher, conversations, request_of, results), results)
        return [results[number][0] for number in range(len(conversations))]

    def _check(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: SamplingParams) -> None:
        check_prompts(prompts, seeds, params, self.architecture.vocab, self.max_context, self.tokenizer is not None)

    def _require_ready(self) -> None:
        self._gate.require_ready()
        if self._asleep:
            raise RuntimeError(f"the engine sleeps ({', '.join(sorted(self._asleep))}): call wake() before generate()")

    def _request(self, index: int, prompt: Sequence[int], params: SamplingParams, seed: int) -> GenerateRequest:
        experts = self.architecture.experts if self.config.return_routed_experts else None
        return GenerateRequest(
            index=index,
            token_ids=prompt,
            seeds=[sample_seed(params.seed, seed, sample) for sample in range(params.n)],
            params=params,
            eos_token_ids=self.eos_token_ids,
            vocab=self.architecture.vocab,
            routed_experts=(self.architecture.num_layers, experts.experts_per_token) if experts else None,
        )

    def _lead(self, asking: Coroutine[Any, Any, None], results: dict[int, list[Any]]) -> None:
        """Wait for ``asking``, which fills ``results``. A server that comes back without the newest weights gets those
        of `load_shards`; those of a push have to be pushed again, which is worth it where no other server is left."""
        work = self._loop.submit(asking)
        try:
            while not concurrent.futures.wait([work], timeout=POLL_SECONDS).done:
                self.replica.heartbeat(CALL_SECONDS)
                outdated = self._membership.of(State.OUTDATED) if self._membership.serving else []
                if outdated and self._shards:
                    self._rewrite(outdated)
                elif outdated and not self._membership.of(State.READY):
                    raise ServersLostError(f"no server holds the weights: {self._membership.describe()}", results)
            work.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the engine was closed while it generated") from None
        except BaseException:
            work.cancel()
            self._loop.run(self._dispatcher.settled())  # no server goes on generating, whatever comes next
            raise

    def _rewrite(self, outdated: Sequence[Member]) -> None:
        self.replica.call("rewrite")
        logger.warning("writing weights anew to %s", ", ".join(member.client.url for member in outdated))
        self._loop.run(self._membership.stop(outdated, "abort"))
        try:
            self._write_all(self._shards)
        except RuntimeError as error:  # it may have gone again
            logger.warning("weights could not be written anew: %s", error)
            return
        self._loop.run(self._membership.resume([m for m in outdated if m.state is State.OUTDATED]))

    def _follow(self) -> None:
        """The other ranks' part in `generate`: bring their shards when they are called for."""
        for _ in self.replica.rewrites():
            try:
                self._write_all(self._shards)
            except RuntimeError as error:
                logger.warning("weights could not be written anew: %s", error)

    def sleep(self, tags: Sequence[str] = TAGS) -> None:
        check_tags(tags)
        self._asleep.update(tags)
        if "weights" in tags:
            self._gate.empty()
            self._membership.versions.clear()
        if self.replica.leads:
            self._loop.run(self._release(tags))

    async def _release(self, tags: Sequence[str]) -> None:
        membership = self._membership
        membership.serving = False
        await membership.stop(membership.of(State.READY, State.OUTDATED), "abort")
        await membership.each(membership.of(State.OUTDATED), lambda client: client.release_memory(tags))

    def wake(self, tags: Sequence[str] = TAGS) -> None:
        check_tags(tags)
        again = sorted(self._asleep & set(tags))
        self._asleep.difference_update(tags)
        if self.replica.leads and again:
            self._loop.run(self._resume(again))

    async def _resume(self, tags: Sequence[str]) -> None:
        membership = self._membership
        await membership.each(membership.of(State.OUTDATED), lambda client: client.resume_memory(tags))
        if membership.versions and not self._asleep:
            await membership.serve(membership.unchanged())

    def close(self) -> None:
        with self._closing:
            if not self._loop.is_closed:
                self._loop.run(self._dispatcher.end())
            self._loop.close()  # before the servers: it would start those again that are gone
            for member in self._membership.members:
                if member.server is not None:
                    member.server.close()
            self._folder.cleanup()
