"""`Session`: one conversation with a model, as tokens, within limits: `begin`, then `reply` and `observe` in turn."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.messages import Message
from megatron_rl.environments.chat import Chat, Tools
from megatron_rl.environments.environment import EpisodeError
from megatron_rl.environments.environment_config import EnvironmentConfig
from megatron_rl.environments.tool_calls import ToolFormat, format_of, parse_turn
from megatron_rl.environments.transcript import Transcript, Turn

Ask = Callable[[Sequence[int], int, int], Awaitable[Turn]]  # (token ids, most tokens, seed)
Decode = Callable[[Sequence[int]], tuple[str, list[tuple[int, str]]]]  # text, and the special tokens left out of it


@dataclass(frozen=True)
class Model:
    """What the conversations of one call have in common."""

    chat: Chat
    decode: Decode
    stop_token_ids: Collection[int]  # a turn that ends with one of them is closed
    turn_tokens: int  # most tokens of one turn
    context: int  # most tokens altogether
    tool_format: ToolFormat

    @classmethod
    def of(cls, chat: Chat, config: EnvironmentConfig, **facts: Any) -> Model:
        tool_format = format_of(chat.template) if config.tool_format == "auto" else config.tool_format
        return cls(chat=chat, tool_format=tool_format, **facts)


class Session:
    """One conversation.

    Args:
        ask: lets the engine generate.
        seed: of a turn, by its number.
    """

    def __init__(self, model: Model, config: EnvironmentConfig, ask: Ask, seed: Callable[[int], int]) -> None:
        self.model, self.config, self._ask, self._seed = model, config, ask, seed
        self._started = time.monotonic()
        self._tools: Tools = ()
        self._last_token: int | None = None  # of the last turn, where it is a stop token
        self._transcript: Transcript | None = None
        self.ended = False  # by a limit, or by the environment

    @property
    def transcript(self) -> Transcript:
        assert self._transcript is not None, "begin was not called"
        return self._transcript

    @property
    def begun(self) -> bool:
        return self._transcript is not None

    def begin(self, messages: list[Message], tools: Tools) -> None:
        """The conversation's first messages.

        Raises:
            EpisodeError: they do not fit the model's context.
        """
        self._tools = tools
        text, ids = self.model.chat.begin(messages, tools)
        if len(ids) >= self.model.context:
            raise EpisodeError(
                f"the conversation begins with {len(ids)} tokens, but the model's context has {self.model.context}"
            )
        self._transcript = Transcript(ids, text, list(messages))

    @property
    def _room(self) -> int:
        """Tokens that may still follow."""
        made = len(self.transcript.token_ids)
        room = self.model.context - len(self.transcript.prompt_ids) - made
        return room if self.config.max_tokens is None else min(room, self.config.max_tokens - made)

    async def reply(self) -> Message:
        """The model's next message. ``ended`` is set where a limit cut it off."""
        transcript = self.transcript
        seed, room = self._seed(transcript.turns), min(self.model.turn_tokens, self._room)
        turn = await self._ask(transcript.all_ids, room, seed)
        closed = turn.token_ids[-1] in self.model.stop_token_ids
        self._last_token = turn.token_ids[-1] if closed else None
        transcript.generated(turn, *self.model.decode(turn.token_ids))
        text = self._raw_text(turn.token_ids[:-1] if closed else turn.token_ids)
        transcript.messages.append({"role": "assistant", "content": text})
        if turn.finish_reason != "stop":
            self._end(turn.finish_reason)
        if not self._tools:
            return {"role": "assistant", "content": text}
        return parse_turn(text, self.model.tool_format).message(transcript.turns)

    def observe(self, messages: list[Message]) -> bool:
        """Append an observation; whether another turn may follow. Where none may, nothing is appended."""
        if self.ended:
            return False
        if self.transcript.turns >= self.config.max_turns:
            return self._end("turns")
        if self.config.seconds is not None and time.monotonic() - self._started > self.config.seconds:
            return self._end("seconds")
        ids = self.model.chat.between(messages, self._tools, self._last_token)
        if len(ids) >= self._room:
            return self._end("length")
        self.transcript.observed(ids, messages)
        return True

    def _end(self, reason: str) -> bool:
        self.ended, self.transcript.finish_reason = True, reason
        return False

    def _raw_text(self, token_ids: Sequence[int]) -> str:
        """With special tokens, since some formats of calls are made of them."""
        tokenizer: Any = self.model.chat.tokenizer
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))
