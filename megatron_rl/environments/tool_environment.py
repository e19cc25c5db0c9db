"""`ToolEnvironment`: tools are run until the model answers without calling any; rewards judge that answer.

Its reward is 0: what an answer is worth is said by reward functions, which read all that was generated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_rl.config import ConfigError, ConfigRecord, load_user_object
from megatron_rl.data.messages import Message
from megatron_rl.environments.environment import ENVIRONMENTS, Environment, Step
from megatron_rl.environments.tools import Tool


@ENVIRONMENTS.register("tools")
class ToolEnvironment(Environment):
    """Functions that the model may call.

    Args:
        options: a `ToolEnvironment.Config`; or the functions themselves.
    """

    class Config(ConfigRecord):
        """Which tools there are."""

        tools: tuple[str, ...]
        """Functions: python:package.module:function or python:path/to/file.py:function. Their types and docstrings
        become what the model is told of them."""

    name = "tools"
    roles = ("tool",)

    def __init__(self, options: Config | Iterable[Callable[..., Any]]) -> None:
        functions: Iterable[Any] = (
            [load_user_object(name) for name in options.tools] if isinstance(options, self.Config) else options
        )
        self.tools = [made if isinstance(made, Tool) else Tool.of(made) for made in functions]
        if not self.tools:
            raise ConfigError("an environment of tools needs at least one function")
        self._by_name = {tool.name: tool for tool in self.tools}

    def step(self, message: Message) -> Step:
        """Run the tools that are called; mistakes in a call are told to the model."""
        results = [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "name": call["function"]["name"],
                "content": self._run(call["function"]),
            }
            for call in message.get("tool_calls", ())
        ]
        for number, error in enumerate(message.get("tool_call_errors", ())):
            results.append({"role": "tool", "tool_call_id": f"error{number:04d}", "name": "error", "content": error})
        return Step(results, done=not results)

    def _run(self, called: Mapping[str, Any]) -> str:
        tool = self._by_name.get(called["name"])
        if tool is None:
            return f"error: there is no tool {called['name']!r}, only {', '.join(self._by_name)}"
        try:
            value = tool(called["arguments"])
        except Exception as error:  # whatever the model's arguments made it raise
            return f"error: {error or type(error).__name__}"
        return value if isinstance(value, str) else json.dumps(value, default=str)
