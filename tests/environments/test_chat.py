"""Conversations as tokens: what is appended is what the template writes, and templates that rewrite are refused."""

from __future__ import annotations

import json

import pytest
from environments.chat_templates import LLAMA, MISTRAL, OPEN_THINKING, QWEN, tokenizer_of

from megatron_rl.config import ConfigError
from megatron_rl.environments import Chat, Tool


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


TOOLS = [Tool.of(add).schema]
QUESTION = {"role": "user", "content": "what is 1 + 2?"}
RESULT = {"role": "tool", "tool_call_id": "call00100", "name": "add", "content": "3"}
FOLLOW_UP = {"role": "user", "content": "and then?"}


@pytest.mark.parametrize("template", [QWEN, LLAMA, MISTRAL], ids=["qwen", "llama", "mistral"])
@pytest.mark.parametrize("results", [1, 2])
def test_prompt_answer_and_observation_are_the_tokens_of_the_whole_conversation(template: str, results: int) -> None:
    tokenizer = tokenizer_of(template)
    chat = Chat(tokenizer)
    chat.check(["tool"], TOOLS)
    _, prompt = chat.begin([QUESTION], TOOLS)
    answer, said = "I add.", {"content": "I add."}
    if template == MISTRAL:  # which takes results only behind calls
        call = {"id": "call00100", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        said = {"content": "", "tool_calls": [call]}
        answer = "[TOOL_CALLS][" + json.dumps(call["function"]) + "call00100]"
    generated = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    observation = [RESULT | {"tool_call_id": f"call0010{i}"} for i in range(results)]
    following = chat.between(observation, TOOLS, tokenizer.eos_token_id)
    messages = [QUESTION, {"role": "assistant", **said}, *observation]
    whole = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert prompt + generated + following == tokenizer.encode(whole, add_special_tokens=False)


def test_a_turn_that_no_stop_token_closed_gets_the_end_of_its_turn() -> None:
    tokenizer = tokenizer_of(QWEN)
    open_turn, closed = (Chat(tokenizer).between([RESULT], TOOLS, last) for last in (None, tokenizer.eos_token_id))
    assert open_turn == [tokenizer.eos_token_id, *closed]


@pytest.mark.parametrize(("template", "role"), [(LLAMA, "user"), (OPEN_THINKING, "user"), (OPEN_THINKING, "tool")])
def test_templates_that_only_append_pass(template: str, role: str) -> None:
    Chat(tokenizer_of(template)).check([role], TOOLS)


@pytest.mark.parametrize(
    ("template", "variables", "roles", "found"),
    [
        (QWEN, {}, ["user"], "now: 'Q7answerQ71"),  # the thinking is gone
        (QWEN, {"enable_thinking": False}, ["tool"], "now: 'Q7answerQ71"),  # so is the empty thinking
        (MISTRAL, {}, ["user"], r"now: 'INST\]"),  # tools have moved to the last question
    ],
    ids=["thinking dropped", "empty thinking dropped", "tools moved"],
)
def test_a_template_that_rewrites_the_beginning_is_an_error_with_the_first_token_that_differs(
    template: str, variables: dict, roles: list[str], found: str
) -> None:
    tokenizer = tokenizer_of(template)
    with pytest.raises(ConfigError, match=found) as caught:
        Chat(tokenizer, variables).check(roles, TOOLS)
    # The position is that of the first token in which two renderings by transformers differ.
    given = {"tools": TOOLS, "tokenize": False, "add_generation_prompt": True} | variables
    question = {"role": "user", "content": "Q7questionQ7"}
    before = tokenizer.apply_chat_template([question], **given)
    thinks = template == QWEN and not variables
    answer = "<think>\nQ7thought1Q7\n</think>\n\nQ7answerQ71" if thinks else "Q7answerQ71"
    observed = {"role": roles[0], "content": "Q7observation10Q7", "tool_call_id": "call00100", "name": "tool"}
    after = tokenizer.apply_chat_template([question, {"role": "assistant", "content": answer}, observed], **given)
    one, other = (tokenizer.encode(text, add_special_tokens=False) for text in (before + answer, after))
    place = next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    assert f"at token {place} it writes {other[place]} " in str(caught.value)
    assert f"the model had {one[place]} " in str(caught.value)


def test_a_rewritten_beginning_may_be_kept_as_it_was_generated() -> None:
    tokenizer = tokenizer_of(QWEN)
    following = Chat(tokenizer, keep_rewritten=True).between([FOLLOW_UP], TOOLS, tokenizer.eos_token_id)
    assert tokenizer.decode(following) == "\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_refuses_a_role_says_so() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(LLAMA)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="no tools here"):
        Chat(tokenizer).check(["tool"], TOOLS)
