"""From text or chat messages to token ids, through whatever tokenizer is given.

A prompt or completion is a string, or a list of messages ``{"role": ..., "content": ...}`` that the tokenizer's chat
template renders. Prompts keep the tokenizer's special tokens, one BOS at most; completions end with EOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_rl.data.messages import Message, Tools, read_messages, rendered
from megatron_rl.data.records import DataError
from megatron_rl.log import leave_out

Text = str | list[Message]

# Rows that are too long are counted and skipped, or cut, or refused, by what the data's own settings say.
leave_out("transformers.tokenization_utils_base", "Token indices sequence length")


class Tokenizer(Protocol):
    """What this package needs of a tokenizer; those of `transformers` have it."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def check_text(value: Any, where: str) -> Text:
    """``value`` when it is a string or messages; these as `read_messages` gives them.

    Raises:
        DataError: it is neither; ``where`` names the row and column.
    """
    if isinstance(value, str):
        return value
    messages = read_messages(value)
    if messages is not None:
        return messages
    raise DataError(
        f"{where} is {type(value).__name__} {repr(value)[:80]}, expected a string or a list of chat messages, each "
        "with a role and a content (or tool calls)"
    )


def encode(text: str, tokenizer: Tokenizer, special: bool) -> list[int]:
    """Token ids of a text that stands at the beginning of a sequence.

    A text that writes BOS itself, as many chat templates do, gets no second one; an EOS that the tokenizer appends is
    left out, for something follows.

    Args:
        special: let the tokenizer add its special tokens.

    Raises:
        DataError: the text holds a lone surrogate, half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate {text[error.start]!r}, half of a character, at position {error.start}, "
            "which no tokenizer can encode: mend or drop the row"
        ) from None
    ids = list(tokenizer.encode(text, add_special_tokens=special))
    bos = getattr(tokenizer, "bos_token_id", None)  # the least that a tokenizer must have does not include it
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    appended = special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    if appended and list(tokenizer.encode(text, add_special_tokens=False))[-1:] != ids[-1:]:
        del ids[-1]
    return ids


def render(
    messages: list[Message],
    tokenizer: Tokenizer,
    open_turn: bool,
    tools: Tools | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Messages through the chat template; with ``open_turn`` the assistant's turn is begun.

    Args:
        variables: further ones of the template.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the messages.
    """
    given: dict[str, Any] = dict(variables or {}) | ({"tools": tools} if tools else {})

    def template(messages: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn, **given))

    try:
        return rendered(messages, template)
    except Exception as error:  # templates raise jinja2's own errors, a missing one ValueError
        roles = ", ".join(str(m["role"]) for m in messages)
        raise DataError(
            f"the tokenizer's chat template cannot render messages with roles {roles}: {error}. Give plain text, or a "
            "tokenizer with a fitting template (tokenizer.chat_template = ...)"
        ) from None


def prompt_text(prompt: Text, tokenizer: Tokenizer, tools: Tools | None = None) -> str:
    """The prompt as the model sees it: a string as it is, messages rendered with the assistant's turn begun."""
    return prompt if isinstance(prompt, str) else render(prompt, tokenizer, open_turn=True, tools=tools)


def encode_completions(
    prompt: Text, completions: Sequence[Text], tokenizer: Tokenizer, tools: Tools | None = None
) -> tuple[list[int], list[list[int]]]:
    """Token ids of one prompt and of its completions; plain-text completions get EOS at their end.

    When any of them is messages, all are: a string prompt becomes the user's turn, a string completion the assistant's.
    Prompt and completion are tokenised together and cut where the prompt's own tokens end, so that a tokenizer which
    marks word beginnings puts no space into the seam; where the tokens of both would merge, they are tokenised apart.
    """
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
        prompt_ids = encode(prompt, tokenizer, special=True)
        texts = [str(completion) for completion in completions]
        encoded = [_encode_ending(prompt, prompt_ids, text, tokenizer, special=True) for text in texts]
        return prompt_ids, [_with_eos(ids, tokenizer) for ids in encoded]
    turns = [as_messages(completion, "assistant") for completion in completions]
    start, endings = _chat_texts(as_messages(prompt, "user"), turns, tokenizer, tools)
    prompt_ids = encode(start, tokenizer, special=False)
    return prompt_ids, [_encode_ending(start, prompt_ids, text, tokenizer, special=False) for text in endings]


def as_messages(text: Text, role: str) -> list[Message]:
    """``text`` as messages; a string becomes one message of ``role``."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading elements are equal."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _chat_texts(
    prompt: list[Message], completions: list[list[Message]], tokenizer: Tokenizer, tools: Tools | None
) -> tuple[str, list[str]]:
    # Some templates begin the assistant's turn with text that a finished turn does not have (an opening <think>); what
    # the renderings do not share belongs to the completions.
    opened = render(prompt, tokenizer, open_turn=True, tools=tools)
    whole = [render(prompt + completion, tokenizer, open_turn=False, tools=tools) for completion in completions]
    shared = min((common_prefix(opened, text) for text in whole), default=len(opened))
    return opened[:shared], [text[shared:] for text in whole]


def _encode_ending(start: str, prompt_ids: list[int], ending: str, tokenizer: Tokenizer, special: bool) -> list[int]:
    together = encode(start + ending, tokenizer, special)
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    return list(tokenizer.encode(ending, add_special_tokens=False))


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
