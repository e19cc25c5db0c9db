"""`AgentSession`: requests of an agent, each with the whole conversation, as turns of one `Session`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from megatron_rl.data.messages import Message, read_messages, without_nulls
from megatron_rl.environments.session import Session


class RefusedError(Exception):
    """A request that this conversation cannot answer; ``code`` is that of OpenAI's errors."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class AgentSession:
    """Lives on the event loop on which it is made; `elsewhere` is for others."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._known: list[Message] = []  # as the agent has them
        self._loop = asyncio.get_running_loop()
        self._one_at_a_time = asyncio.Lock()
        self._answering: set[asyncio.Future[Any]] = set()

    async def elsewhere(self, body: Any) -> tuple[Message, dict[str, int]]:
        """`answer`, from another event loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._answer(body), self._loop))

    async def _answer(self, body: Any) -> tuple[Message, dict[str, int]]:
        task = asyncio.ensure_future(self.answer(body))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return await task

    def end(self) -> None:
        """Give up what is still asked for: the agent has ended or was given up."""
        for task in self._answering:
            task.cancel()

    async def answer(self, body: Any) -> tuple[Message, dict[str, int]]:
        """The choice and the usage of a chat completion.

        Raises:
            RefusedError: the messages do not continue this conversation, a limit has ended it, or what is asked for
                cannot be had.
        """
        messages = read_messages(body.get("messages")) if isinstance(body, Mapping) else None
        if messages is None:
            raise RefusedError("messages are missing, or no chat messages")
        if body.get("n", 1) not in (1, None) or body.get("stop"):
            raise RefusedError("n and stop are those of the run: set them in its sampling")
        async with self._one_at_a_time:
            new = self._new_messages(messages)
            session = self.session
            if not session.begun:
                session.begin(new, without_nulls(body.get("tools") or []))
            elif not session.observe(new):
                reason = session.transcript.finish_reason
                raise RefusedError(f"the episode has ended: {reason}", "context_length_exceeded")
            before = len(session.transcript.all_ids)
            message = for_agent(await session.reply())
            self._known = [*messages, message]
            made = len(session.transcript.all_ids) - before
        reason = "tool_calls" if "tool_calls" in message else "length" if session.ended else "stop"
        usage = {"prompt_tokens": before, "completion_tokens": made, "total_tokens": before + made}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}, usage

    def _new_messages(self, messages: list[Message]) -> list[Message]:
        for number, (known, given) in enumerate(zip(self._known, messages, strict=False)):
            if _essence(known) != _essence(given):
                raise RefusedError(
                    f"message {number} differs from the one before in this conversation: a session is one "
                    f"conversation, which only grows (it was {str(_essence(known))[:200]}, now it is "
                    f"{str(_essence(given))[:200]})"
                )
        new = messages[len(self._known) :]
        if not new or (self._known and any(message["role"] == "assistant" for message in new)):
            raise RefusedError(
                f"{len(messages)} messages do not continue a conversation of {len(self._known)}: expected those, and "
                "new ones of other roles than assistant"
            )
        return new


def for_agent(message: Message) -> Message:
    """With arguments as JSON text, as OpenAI's API has them."""
    made: Message = {"role": "assistant", "content": message["content"]}
    if "tool_calls" in message:
        made["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return made


def _essence(message: Message) -> tuple[Any, ...]:
    """What two copies of a message have in common, whatever a client adds or leaves out."""
    calls = [
        (call.get("id"), call["function"]["name"], _parsed(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]
    return message["role"], message.get("content") or "", message.get("tool_call_id"), calls


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
