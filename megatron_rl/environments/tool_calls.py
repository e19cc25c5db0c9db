"""Calls of tools in generated text, as the models' chat templates write them.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them: Hermes, Qwen2.5, Qwen3
llama    {"name": ..., "parameters": {...}}, nothing beside it but <|python_tag|>; several with ";": Llama 3.1 to 3.3
mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}: Mistral

Formats: Hermes-Function-Calling's prompt format, Meta's "Llama 3.1 model cards and prompt formats", mistral-common's
instruct tokenizers v3 to v13.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.data.messages import Message

ToolFormat = Literal["hermes", "llama", "mistral"]

_HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\[ARGS\]")


@dataclass(slots=True)
class ParsedTurn:
    """One generated turn."""

    content: str  # without the calls
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (name, arguments)
    errors: list[str] = field(default_factory=list)  # of calls that are none

    def message(self, turn: int) -> Message:
        """As OpenAI's API has it, but with parsed arguments. ``turn`` numbers the calls' ids, of the nine letters and
        digits that Mistral's templates ask for."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": f"call{turn % 1000:03d}{number % 100:02d}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for number, (name, arguments) in enumerate(self.calls)
            ]
        if self.errors:
            message["tool_call_errors"] = list(self.errors)
        return message


def format_of(template: str) -> ToolFormat:
    """The format that a chat template's own text shows; Llama's JSON where it shows none."""
    if "<tool_call>" in template:
        return "hermes"
    return "mistral" if _MISTRAL in template else "llama"


def parse_turn(text: str, tool_format: ToolFormat) -> ParsedTurn:
    """The calls in ``text``; what is no call at all, malformed ones included, is content."""
    return _PARSERS[tool_format](text)


def _hermes(text: str) -> ParsedTurn:
    turn = ParsedTurn(_HERMES.sub("", text).strip())
    for found in _HERMES.finditer(text):
        if not found[2]:
            turn.errors.append("a <tool_call> without </tool_call>")
        else:
            _add(turn, found[1], "arguments")
    return turn


def _llama(text: str) -> ParsedTurn:
    tagged = _PYTHON_TAG in text
    before, _, rest = text.rpartition(_PYTHON_TAG) if tagged else ("", "", text)
    body = rest.strip()
    if not body.startswith("{"):
        return ParsedTurn(text.replace(_PYTHON_TAG, "").strip())
    turn = ParsedTurn(before.strip())
    for value in _json_values(body, separator=";"):
        if isinstance(value, dict) and "name" in value:
            _add(turn, value, "parameters")
        elif not tagged and not turn.calls:  # an answer that happens to be JSON
            return ParsedTurn(text.strip())
        else:
            turn.errors.append(f"a call that is not JSON with name and parameters: {str(value)[:80]}")
    return turn


def _mistral(text: str) -> ParsedTurn:
    content, mark, rest = text.partition(_MISTRAL)
    turn = ParsedTurn(content.strip())
    for part in rest.split(_MISTRAL) if mark else ():
        named = _MISTRAL_NAMED.match(part)
        if named is not None:
            _add(turn, {"name": named[1], "arguments": part[named.end() :]}, "arguments")
            continue
        value = next(_json_values(part.strip()), None)
        for call in value if isinstance(value, list) else [value]:
            _add(turn, call, "arguments")
    return turn


_PARSERS: dict[ToolFormat, Callable[[str], ParsedTurn]] = {"hermes": _hermes, "llama": _llama, "mistral": _mistral}


def _add(turn: ParsedTurn, call: Any, key: str) -> None:
    """Add one call, or what is wrong with it."""
    try:
        value = json.loads(call) if isinstance(call, str) else call
        arguments = value.get(key, value.get("arguments", value.get("parameters", {})))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(value["name"], str) or not isinstance(arguments, dict):
            raise TypeError
        turn.calls.append((value["name"], arguments))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        turn.errors.append(f"a call that is not JSON with name and {key}: {str(call).strip()[:80]}")


def _json_values(text: str, separator: str = "") -> Iterator[Any]:
    """JSON values at the beginning of ``text``, with ``separator`` between them; what is none comes as text, once."""
    decoder = json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            yield text
            return
        yield value
        text = text[end:].strip().removeprefix(separator).strip() if separator else ""
