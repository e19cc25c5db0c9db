"""`hold_rounds`: many conversations with an engine that answers batches: `RolloutEngine.converse` in rounds.

Conversations are coroutines on an event loop. When all that still run wait for an answer, the engine generates one for
each of them, in the thread that called: so the batches, and what the engine makes of them, do not depend on timing.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rl.parallel.abandon import Abandoned, overdue
from megatron_rl.rollout.base import Completion, Conversation, SamplingParams
from megatron_rl.rollout.local.sharding import TensorParallel
from megatron_rl.rollout.sglang.event_loop import EventLoop, together

POLL_SECONDS = 0.2  # how often a rank that waits for environments looks whether the step is to be abandoned

T = TypeVar("T")
Generate = Callable[[Sequence[Sequence[int]], SamplingParams, Sequence[int]], list[list[Completion]]]


@dataclass(slots=True)
class _Asked:
    """One conversation's request."""

    conversation: int
    token_ids: list[int]
    max_tokens: int
    seed: int
    answer: asyncio.Future[Completion]


class _Rounds:
    """The event loop's side. `ready` gets all requests of a round, and [] when every conversation has ended."""

    def __init__(self, count: int) -> None:
        self.ready: queue.SimpleQueue[list[_Asked]] = queue.SimpleQueue()
        self._running = set(range(count))
        self._waiting: dict[int, _Asked] = {}  # by conversation

    async def hold(self, conversations: Sequence[Conversation[T]]) -> list[T]:
        try:
            return await together(self._hold(i, one) for i, one in enumerate(conversations))
        finally:
            self.ready.put([])

    async def _hold(self, index: int, conversation: Conversation[T]) -> T:
        loop = asyncio.get_running_loop()

        async def ask(token_ids: Sequence[int], max_tokens: int, seed: int) -> Completion:
            if index not in self._running or index in self._waiting:
                raise RuntimeError(f"conversation {index} has ended, or asks twice at a time")
            asked = _Asked(index, list(token_ids), max_tokens, seed, loop.create_future())
            self._waiting[index] = asked
            self._look()
            return await asked.answer

        try:
            return await conversation(ask)
        finally:
            self._running.discard(index)
            self._waiting.pop(index, None)  # given up while it waited
            self._look()

    def _look(self) -> None:
        if self._waiting and len(self._waiting) == len(self._running):
            self.ready.put([self._waiting[index] for index in sorted(self._waiting)])
            self._waiting.clear()


def hold_rounds(
    generate: Generate, params: SamplingParams, tp: TensorParallel, conversations: Sequence[Conversation[T]]
) -> list[T]:
    """The results of ``conversations``, which are held on the first rank; elsewhere an empty list. Collective over
    ``tp``.

    Raises:
        Exception: a conversation's, on the first rank only.
        Abandoned: a signal asked the run to stop, on every rank.
    """
    if tp.rank:
        _follow(generate, params, tp)
        return []
    loop, rounds = EventLoop("conversations"), _Rounds(len(conversations))
    try:
        work = loop.submit(rounds.hold(conversations))
        while asked := _next_round(rounds, tp):
            told = [(one.token_ids, one.max_tokens, one.seed) for one in asked]
            _share(tp, told)
            answers = _generate(generate, params, told)
            loop.run(_deliver(asked, answers))
        _share(tp, [])
        return work.result()
    finally:
        loop.close()


async def _deliver(asked: Sequence[_Asked], answers: Sequence[Completion]) -> None:
    for one, answer in zip(asked, answers, strict=True):
        if not one.answer.done():  # its conversation was given up
            one.answer.set_result(answer)


def _next_round(rounds: _Rounds, tp: TensorParallel) -> list[_Asked]:
    while True:
        try:
            return rounds.ready.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if tp.size > 1 and (signal := overdue()):  # one rank alone is interrupted by itself
                _share(tp, signal)
                raise Abandoned(signal) from None


def _follow(generate: Generate, params: SamplingParams, tp: TensorParallel) -> None:
    while told := _share(tp, None):
        if isinstance(told, int):
            raise Abandoned(told)
        _generate(generate, params, told)


def _share(tp: TensorParallel, value: Any) -> Any:
    """The first rank's value on every rank."""
    if tp.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=tp.group, group_src=0)
    return values[0]


def _generate(
    generate: Generate, params: SamplingParams, told: Sequence[tuple[list[int], int, int]]
) -> list[Completion]:
    """One answer each; an engine takes one limit a call, and almost all have the same."""
    answers: dict[int, Completion] = {}
    for limit in sorted({max_tokens for _, max_tokens, _ in told}):
        own = [i for i, (_, max_tokens, _) in enumerate(told) if max_tokens == limit]
        single = params.model_copy(update={"n": 1, "max_tokens": limit})
        made = generate([told[i][0] for i in own], single, [told[i][2] for i in own])
        answers |= {i: completions[0] for i, completions in zip(own, made, strict=True)}
    return [answers[i] for i in range(len(told))]
