"""Tools: schemas against those of transformers, checked arguments, and calls as models write them."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from megatron_rl.config import ConfigError
from megatron_rl.environments import Tool, ToolEnvironment
from megatron_rl.environments.tool_calls import format_of, parse_turn


def search(query: str, limit: int = 3, tags: list[str] | None = None) -> str:
    """Looks a text up.

    Args:
        query: what to look for,
            in a few words
        limit: most results
        tags: only those with
            one of these tags
    """
    return f"{query}/{limit}/{tags}"


def order(side: Literal["buy", "sell"], amount: float) -> dict:
    """Trades.

    Args:
        side: which way
        amount: how much

    Returns:
        the order
    """
    return {"side": side, "amount": amount}


@pytest.mark.parametrize("function", [search, order])
def test_a_schema_says_what_that_of_transformers_says(function) -> None:
    ours, theirs = Tool.of(function).schema, get_json_schema(function)
    theirs["function"].pop("return", None)
    properties, others = (schema["function"]["parameters"]["properties"] for schema in (ours, theirs))
    assert {n: " ".join(p["description"].split()) for n, p in others.items()} == {
        n: p["description"] for n, p in properties.items()
    }
    assert ours["function"]["parameters"]["required"] == theirs["function"]["parameters"]["required"]
    assert ours["function"]["description"] == theirs["function"]["description"]
    assert properties["limit" if "limit" in properties else "amount"]["type"] in ("integer", "number")
    if function is order:
        assert properties["side"]["enum"] == others["side"]["enum"] if "enum" in others["side"] else ["buy", "sell"]


def test_arguments_are_checked_and_converted() -> None:
    tool = Tool.of(search)
    assert tool({"query": "x", "limit": "5"}) == "x/5/None"
    with pytest.raises(ValueError, match=r"limit: .*integer"):
        tool({"query": "x", "limit": "many"})
    with pytest.raises(ValueError, match="colour: Extra inputs"):
        tool({"query": "x", "colour": 1})


def test_a_function_that_cannot_be_a_tool_says_why() -> None:
    def untyped(x):
        """Has no types."""

    def silent(x: int) -> int:
        return x

    with pytest.raises(ConfigError, match="'x' has no type"):
        Tool.of(untyped)
    with pytest.raises(ConfigError, match="no docstring"):
        Tool.of(silent)


ARGUMENTS = st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.lists(st.booleans()), max_size=3)


@given(arguments=ARGUMENTS.filter(lambda found: "tool_call" not in json.dumps(found)))
def test_calls_come_back_as_the_templates_write_them(arguments: dict) -> None:
    text = json.dumps({"name": "f", "arguments": arguments})
    for written, tool_format in (
        (f"Let me see.\n<tool_call>\n{text}\n</tool_call>\n<tool_call>{text}</tool_call>", "hermes"),
        (f"Let me see.[TOOL_CALLS] [{text}, {text}]", "mistral"),
        (f"Let me see.[TOOL_CALLS]f[ARGS]{json.dumps(arguments)}[TOOL_CALLS]f[ARGS]{json.dumps(arguments)}", "mistral"),
        ("Let me see.<|python_tag|>" + "; ".join([text.replace("arguments", "parameters", 1)] * 2), "llama"),
    ):
        turn = parse_turn(written, tool_format)
        assert (turn.content, turn.calls, turn.errors) == ("Let me see.", [("f", arguments)] * 2, [])


def test_llamas_call_needs_no_mark_and_other_json_is_an_answer() -> None:
    assert parse_turn('{"name": "f", "parameters": {"a": 1}}', "llama").calls == [("f", {"a": 1})]
    answer = parse_turn('{"result": 3}', "llama")
    assert (answer.content, answer.calls, answer.errors) == ('{"result": 3}', [], [])


@pytest.mark.parametrize(
    ("text", "tool_format"),
    [
        ('<tool_call>{"name": "f"', "hermes"),
        ("<tool_call>nothing</tool_call>", "hermes"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "hermes"),
        ("<|python_tag|>{1}", "llama"),
        ("[TOOL_CALLS] [{]", "mistral"),
        ("[TOOL_CALLS]f[ARGS]{", "mistral"),
    ],
)
def test_a_malformed_call_is_an_error_that_the_environment_hears_of(text: str, tool_format) -> None:
    turn = parse_turn(text, tool_format)
    assert len(turn.errors) == 1
    assert not turn.calls
    step = ToolEnvironment([search]).step(turn.message(1))
    assert not step.done
    assert step.messages[0]["content"] == turn.errors[0]


@given(st.text())
def test_any_text_is_parsed(text: str) -> None:
    for tool_format in ("hermes", "llama", "mistral"):
        parse_turn(text, tool_format)
        parse_turn("<tool_call>" + text, tool_format)
        parse_turn("[TOOL_CALLS]" + text, tool_format)


def test_the_format_is_read_off_the_template() -> None:
    assert [format_of(t) for t in ("<tool_call>", "[TOOL_CALLS]", "<|eot_id|>")] == ["hermes", "mistral", "llama"]


def test_tools_run_and_tell_the_model_of_its_mistakes() -> None:
    environment = ToolEnvironment([search, order])
    text = "".join(
        f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        for name, arguments in (
            ("search", {"query": "x"}),
            ("order", {"side": "buy", "amount": 2}),
            ("order", {"side": "hold", "amount": 2}),
            ("missing", {}),
        )
    )
    step = environment.step(parse_turn(text, "hermes").message(3))
    contents = [message["content"] for message in step.messages]
    assert contents[:2] == ["x/3/None", '{"side": "buy", "amount": 2.0}']
    assert contents[2].startswith("error: side")
    assert contents[3] == "error: there is no tool 'missing', only search, order"
    assert [message["tool_call_id"] for message in step.messages] == [f"call003{i:02d}" for i in range(4)]
    assert environment.step({"role": "assistant", "content": "done"}).done
