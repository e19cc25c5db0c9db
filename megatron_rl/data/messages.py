"""Chat messages and tools, whatever source they come from, as JSON lines would give them.

Parquet and `datasets` give every row the union of all rows' fields, with nulls where a row has none; other programs
write a message's text as a list of parts. Chat templates know neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.data.records import DataError, Row

Message = dict[str, Any]
Tools = list[Any]  # JSON schemas of functions, or functions, as `transformers` takes them

TOOLS = "tools"  # the column that holds what the chat template's ``tools`` gets


def read_messages(value: Any) -> list[Message] | None:
    """Chat messages without nulls and with text as content; None where ``value`` is something else.

    Raises:
        DataError: a part of a message's content is not text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return None
    messages = [_message(one) for one in value]
    return None if None in messages else messages  # type: ignore[return-value]


def _message(value: Any) -> Message | None:
    if not isinstance(value, Mapping):
        return None
    message = without_nulls(value)
    if "role" not in message or not ("content" in message or message.get("tool_calls")):
        return None
    content = message.get("content", "")
    is_result = message["role"] == "tool"  # which may be any JSON value
    if isinstance(content, list) and not (is_result and not all(map(_is_text_part, content))):
        message["content"] = "".join(map(_text_of_part, content))
    elif not isinstance(content, str) and not is_result:
        raise DataError(f"a message's content is {type(content).__name__} {repr(content)[:80]}, expected text")
    return message


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if _is_text_part(part):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"a message's content has a part {kind!r}: only text can be used, expected parts of type 'text'")


def without_nulls(value: Any) -> Any:
    """``value`` with every null field of its objects left out, at any depth; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def read_tools(row: Row, place: str) -> Tools | None:
    """The functions that a row's conversation may call; None where it has none. Their JSON text is understood too.

    Raises:
        DataError: the column holds something else; ``place`` names the row.
    """
    value = row.get(TOOLS)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{place}: column {TOOLS!r} is text, but not JSON: expected a list of functions") from None
    tools = without_nulls(value) or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) or callable(tool) for tool in tools):
        raise DataError(
            f"{place}: column {TOOLS!r} is {repr(value)[:80]}, expected a list of JSON schemas of functions"
        )
    return tools


def rendered(messages: list[Message], template: Callable[[list[Message]], str]) -> str:
    """``template`` over messages of which some have no content (an assistant that only calls tools).

    As in `transformers`, a template gets such a message without the field; one that cannot do without gets an empty
    text.

    Raises:
        Exception: the template's own.
    """
    try:
        return template(messages)
    except Exception:
        if all("content" in message for message in messages):
            raise
        return template([{"content": "", **message} for message in messages])
