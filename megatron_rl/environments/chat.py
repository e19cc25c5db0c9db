"""`Chat`: a conversation as tokens that only grow: what was generated is never tokenised again.

The next prompt is the tokens so far and the tokens of what the chat template writes between the model's answer and its
next turn. That is the template's own text only where the template keeps what it wrote before, so this is checked: the
rendering of a longer conversation must begin with that of a shorter one and the answer. Templates that drop earlier
thinking, or move tools to the last user message, fail for some conversations, with the first token that differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.data.messages import Message
from megatron_rl.data.text import Tokenizer, common_prefix, encode, render

ANSWER = "Q7answerQ7"  # stands for what was generated; no template writes it by itself
CONTEXT = 40  # characters shown around a difference

Tools = Sequence[Mapping[str, Any]]


class Chat:
    """One tokenizer's chat template.

    Args:
        variables: of the template, for example ``{"enable_thinking": False}``.
        keep_rewritten: do not check; a conversation goes on as it was generated, even where the template would write
            its beginning otherwise by now.
    """

    def __init__(
        self, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None, keep_rewritten: bool = False
    ) -> None:
        self.tokenizer, self.variables, self.keep_rewritten = tokenizer, dict(variables or {}), keep_rewritten
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._checked: set[tuple[str, ...]] = set()

    @property
    def template(self) -> str:
        """Its source; "" where the tokenizer hides it."""
        source = getattr(self.tokenizer, "chat_template", None)
        return source if isinstance(source, str) else ""

    def begin(self, messages: list[Message], tools: Tools) -> tuple[str, list[int]]:
        """Text and tokens of a conversation whose next turn is the model's."""
        text = self._render(messages, tools)
        return text, encode(text, self.tokenizer, special=False)

    def between(self, observation: list[Message], tools: Tools, last_token: int | None) -> list[int]:
        """Tokens between an answer and the next one: the end of the answer's turn, the observation, the opened turn.

        Args:
            last_token: of the answer where it is a stop token, which takes the place of the template's own.
        """
        self.check([message["role"] for message in observation], tools)
        text = self._after(observation, tools)
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        closes = last_token is not None and ids and (ids[0] == last_token or ids[0] in self.special)
        return ids[1:] if closes else ids

    def check(self, roles: Sequence[str], tools: Tools) -> None:
        """Raises ConfigError where the template does not keep the beginning of a conversation whose observations have
        messages of these roles; the message names the first token that differs."""
        key = tuple(roles)
        if self.keep_rewritten or key in self._checked:
            return
        for thinks in self._kinds_of_answer(tools):
            self._check(key, tools, thinks)
        self._checked.add(key)

    def _check(self, roles: Sequence[str], tools: Tools, thinks: bool) -> None:
        messages: list[Message] = [{"role": "user", "content": "Q7questionQ7"}]
        before = self._render(messages, tools)
        for turn in (1, 2):
            answer = f"{ANSWER}{turn}"
            if thinks:
                answer = f"<think>\nQ7thought{turn}Q7\n</think>\n\n{answer}"
            messages += [{"role": "assistant", "content": answer}, *_probe(roles, turn)]
            kept = before + (answer.removeprefix("<think>\n") if before.rstrip().endswith("<think>") else answer)
            found = self._render(messages, tools)
            if not found.startswith(kept):
                raise ConfigError(self._difference(kept, found, roles, thinks))
            before = found
        ending = self._after(_probe(roles, 2), tools)
        alone, whole = encode(ending, self.tokenizer, special=False), encode(before, self.tokenizer, special=False)
        if before.endswith(ending) and whole[-len(alone) :] != alone:
            raise ConfigError(
                f"the tokenizer splits {ending[:CONTEXT]!r} otherwise where it stands behind an answer: tokens "
                f"{whole[-len(alone) :][:8]} there, {alone[:8]} by itself, so that an observation cannot be appended"
            )

    def _kinds_of_answer(self, tools: Tools) -> list[bool]:
        """Without and with thinking, as far as the template knows of it."""
        opened = self._render([{"role": "user", "content": "Q7questionQ7"}], tools)
        plain = [] if opened.rstrip().endswith("<think>") else [False]
        return [*plain, True] if "</think>" in self.template and not opened.rstrip().endswith("</think>") else plain

    def _after(self, observation: list[Message], tools: Tools) -> str:
        messages: list[Message] = [{"role": "user", "content": "Q7questionQ7"}]
        answer: Message = {"role": "assistant", "content": ANSWER}
        text = self._render([*messages, answer, *observation], tools)
        _, mark, after = text.rpartition(ANSWER)
        if not mark:
            raise ConfigError("the chat template leaves the assistant's messages out, so that nothing can be appended")
        return after

    def _render(self, messages: list[Message], tools: Tools) -> str:
        return render(messages, self.tokenizer, open_turn=True, tools=list(tools) or None, variables=self.variables)

    def _difference(self, kept: str, found: str, roles: Sequence[str], thinks: bool) -> str:
        one, other = (encode(text, self.tokenizer, special=False) for text in (kept, found))
        place = common_prefix(one, other)
        letter = common_prefix(kept, found)
        decode = getattr(self.tokenizer, "decode", str)

        def token(ids: list[int]) -> str:
            return f"{ids[place]} {decode([ids[place]])!r}" if place < len(ids) else "nothing"

        return (
            f"the chat template does not keep the beginning of a conversation in which messages of {', '.join(roles)} "
            f"follow an answer{' with thinking' if thinks else ''}: at token {place} it writes {token(other)} where "
            f"the model had {token(one)} (before: {kept[max(0, letter - CONTEXT) : letter]!r}, now: "
            f"{found[letter : letter + CONTEXT]!r}, then: {kept[letter : letter + CONTEXT]!r}). Give a template that "
            f"appends only, or set environment.rewritten_history=keep to go on with the tokens as they were generated"
        )


def _probe(roles: Sequence[str], turn: int) -> list[Message]:
    """An observation with messages of ``roles``."""
    made: list[Message] = []
    for number, role in enumerate(roles):
        message: Message = {"role": role, "content": f"Q7observation{turn}{number}Q7"}
        if role == "tool":
            message |= {"name": "tool", "tool_call_id": f"call{turn:03d}{number:02d}"}
        made.append(message)
    return made
