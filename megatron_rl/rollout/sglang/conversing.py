"""`hold`: conversations with servers, each at its own pace: none waits for another one's answer or environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.rollout.base import Completion, Conversation
from megatron_rl.rollout.sglang.dispatcher import Dispatcher
from megatron_rl.rollout.sglang.generation import GenerateRequest

MakeRequest = Callable[[int, Sequence[int], int, int], GenerateRequest]  # (conversation, token ids, max_tokens, seed)


async def hold(
    dispatcher: Dispatcher,
    conversations: Sequence[Conversation[Any]],
    request_of: MakeRequest,
    results: dict[int, list[Any]],
) -> None:
    """Put the result of each conversation into ``results``, a list of one, by its number.

    Raises:
        Exception: a conversation's own, or as `Dispatcher.answer_all`; the others are cancelled.
    """

    async def one(number: int, conversation: Conversation[Any]) -> None:
        async def ask(token_ids: Sequence[int], max_tokens: int, seed: int) -> Completion:
            return (await dispatcher.answer(request_of(number, token_ids, max_tokens, seed)))[0]

        results[number] = [await conversation(ask)]

    await dispatcher.all_of([one(number, conversation) for number, conversation in enumerate(conversations)])
