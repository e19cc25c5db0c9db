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
from megatron_rl.data import DataError
from megatron_rl.data.messages import Message
from megatron_rl.data.text import Tokenizer, common_prefix, encode, render

QUESTION = "Q7questionQ7"
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
        added = getattr(tokenizer, "added_tokens_decoder", {})  # a custom tokenizer may have none
        named = {number for number, token in added.items() if token.special}
        self.special = frozenset({*getattr(tokenizer, "all_special_ids", ()), *named})
        self._forms: dict[tuple[str, ...], bool] = {}  # by roles that were looked at: answers need their calls
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
        roles = [message["role"] for message in observation]
        self.check(roles, tools)
        text = self._after(observation, tools, self._needs_calls(tuple(roles), tools))
        ids = encode(text, self.tokenizer, special=False)
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
        calls = self._needs_calls(tuple(roles), tools)
        messages: list[Message] = [{"role": "user", "content": QUESTION}]
        before = self._render(messages, tools)
        for turn in (1, 2):
            answer = f"{ANSWER}{turn}"
            if thinks:
                answer = f"<think>\nQ7thought{turn}Q7\n</think>\n\n{answer}"
            observation = _probe(roles, turn)
            messages += [_answer(answer, observation, calls), *observation]
            kept = before + (answer.removeprefix("<think>\n") if before.rstrip().endswith("<think>") else answer)
            found = self._render(messages, tools)
            if not found.startswith(before if calls else kept):  # how calls are written is the model's choice
                raise ConfigError(self._difference(kept, found, roles, thinks))
            before = found
        ending = self._after(_probe(roles, 2), tools, calls)
        alone, whole = encode(ending, self.tokenizer, special=False), encode(before, self.tokenizer, special=False)
        if before.endswith(ending) and whole[-len(alone) :] != alone:
            raise ConfigError(
                f"the tokenizer splits {ending[:CONTEXT]!r} otherwise where it stands behind an answer: tokens "
                f"{whole[-len(alone) :][:8]} there, {alone[:8]} by itself, so that an observation cannot be appended"
            )

    def _needs_calls(self, roles: tuple[str, ...], tools: Tools) -> bool:
        """Whether the template takes results of tools only behind an answer whose calls it is given, as Mistral's."""

        def two_turns(calls: bool) -> None:
            observation = _probe(roles, 1)
            turn = [_answer(ANSWER, observation, calls), *observation]
            self._render([{"role": "user", "content": QUESTION}, *turn, *turn], tools)

        if roles not in self._forms:
            try:
                two_turns(calls=False)
                self._forms[roles] = False
            except DataError:
                if "tool" not in roles:
                    raise
                two_turns(calls=True)
                self._forms[roles] = True
        return self._forms[roles]

    def _kinds_of_answer(self, tools: Tools) -> list[bool]:
        """Without and with thinking, as far as the template knows of it."""
        opened = self._render([{"role": "user", "content": QUESTION}], tools)
        plain = [] if opened.rstrip().endswith("<think>") else [False]
        return [*plain, True] if "</think>" in self.template and not opened.rstrip().endswith("</think>") else plain

    def _after(self, observation: list[Message], tools: Tools, calls: bool) -> str:
        """What the template writes behind an answer: with ``calls``, behind the text of the answer's last call, whose
        end is the first EOS."""
        question: Message = {"role": "user", "content": QUESTION}
        text = self._render([question, _answer(ANSWER, observation, calls), *observation], tools)
        _, mark, after = text.rpartition(ANSWER)
        if not mark:
            raise ConfigError("the chat template leaves the assistant's messages out, so that nothing can be appended")
        eos = getattr(self.tokenizer, "eos_token", None)
        if calls and (not eos or eos not in after):
            raise ConfigError(f"the chat template does not end the calls of an answer with {eos!r}: {after[:80]!r}")
        return after[after.index(str(eos)) :] if calls else after

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


def _answer(text: str, observation: Sequence[Message], calls: bool) -> Message:
    """An assistant's message; with ``calls`` those of the tools whose results are in the observation."""
    if not calls:
        return {"role": "assistant", "content": text}
    made = [
        {
            "id": message["tool_call_id"],
            "type": "function",
            "function": {"name": message.get("name", "tool"), "arguments": {"value": text}},
        }
        for message in observation
        if message["role"] == "tool"
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def _probe(roles: Sequence[str], turn: int) -> list[Message]:
    """An observation with messages of ``roles``."""
    made: list[Message] = []
    for number, role in enumerate(roles):
        message: Message = {"role": role, "content": f"Q7observation{turn}{number}Q7"}
        if role == "tool":
            message |= {"name": "tool", "tool_call_id": f"call{turn:03d}{number:02d}"}
        made.append(message)
    return made
