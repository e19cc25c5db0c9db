"""`PromptDataset`: prompts for rollouts, from any source of rows, tokenised and limited in length.

dataset = PromptDataset("gsm8k.jsonl.gz", tokenizer, PromptDataset.Config(prompt="question", chat=True))
dataset[0]  # Prompt(token_ids=[...], text="...", answer="... #### 72", index=0)
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_rl.batch import Prompt
from megatron_rl.data.dataset import Limits, SkipRowError, TokenisedDataset
from megatron_rl.data.messages import read_tools
from megatron_rl.data.records import DataError, Records
from megatron_rl.data.text import Text, Tokenizer, as_messages, check_text, encode, prompt_text

SLOT = "{prompt}"


class PromptDataset(TokenisedDataset[Prompt, "PromptDataset.Config"]):
    """Prompts in the order of their rows; ``Prompt.index`` is the row's number in the source, skipped rows included.

    Args:
        source: a path or glob pattern, a `datasets.Dataset` or a list of dicts; None means ``config.path``.
        tokenizer: anything with `encode` and, for messages, `apply_chat_template`, which gets the row's ``tools``.
        limits: of the model that will answer: a prompt is too long, too, when its context does not hold it together
            with the longest answer.
    """

    class Config(TokenisedDataset.Config):
        """The ``data`` section of a run's configuration."""

        prompt: str = "prompt"
        """Column with the prompt: a string, or a list of chat messages."""
        answer: str = "answer"
        """Column with the ground truth for rule-based rewards; data without a column of the default name has none."""
        template: str = SLOT
        """Text around a plain-text prompt, for example "Question: {prompt}\\nAnswer:"."""
        chat: bool = False
        """Give plain-text prompts to the chat template as a user message."""
        system: str = ""
        """System message put before a chat that has none."""
        max_prompt_tokens: int = Field(default=1024, ge=1)
        """Longest prompt, in tokens."""
        overlong: Literal["skip", "error"] = "skip"
        """What to do with longer prompts, and with those that the model's context does not hold together with
        `max_tokens`: leave them out, counted, or stop."""

    def __init__(
        self, source: Any, tokenizer: Tokenizer, config: Config | None = None, limits: Limits | None = None
    ) -> None:
        super().__init__(source, tokenizer, config or self.Config(), limits)

    def token_rows(self, item: Prompt) -> list[list[int]]:
        return [item.token_ids]

    def truth(self, item: Prompt) -> object:
        return item.answer

    def prepare(self, records: Records) -> None:
        records.require(self.config.prompt)
        if "answer" in self.config.model_fields_set:
            records.require(self.config.answer)
        if SLOT not in self.config.template:
            raise DataError(f"data.template {self.config.template!r} has no {SLOT}, so every prompt would be the same")

    def convert(self, records: Records, index: int) -> list[Prompt]:
        config, place = self.config, records.places[index]
        given = check_text(records.value(index, config.prompt), f"{place}: column {config.prompt!r}")
        prompt = self._shape(given)
        row = records.rows[index]
        tools = None if isinstance(prompt, str) else read_tools(row, place)
        text = prompt_text(prompt, self.tokenizer, tools)
        token_ids = encode(text, self.tokenizer, special=isinstance(prompt, str))
        if not token_ids:
            raise DataError(f"{place}: the prompt has no tokens, so there is nothing to continue")
        self._check_length(len(token_ids), place)
        metadata = {name: value for name, value in row.items() if name not in (config.prompt, config.answer)}
        messages = None if isinstance(prompt, str) else prompt
        return [Prompt(token_ids, text, row.get(config.answer), metadata, index, messages)]

    def _check_length(self, length: int, place: str) -> None:
        config, limits, room = self.config, self.limits, self.limits.room
        if length > config.max_prompt_tokens:
            known, what = (
                f"max_prompt_tokens={config.max_prompt_tokens}",
                f"longer than {config.max_prompt_tokens} tokens",
            )
        elif room is not None and length > room:
            known = f"the {room} that max_tokens={limits.response} leaves of the model's context of {limits.context}"
            what = f"longer than {known}"
        else:
            return
        if config.overlong == "error":
            raise DataError(
                f"{place}: the prompt has {length} tokens, more than {known}: raise the limit, or set overlong: skip"
            )
        raise SkipRowError(what)

    def _shape(self, prompt: Text) -> Text:
        if isinstance(prompt, str):
            prompt = self.config.template.replace(SLOT, prompt)
            if not self.config.chat:
                return prompt
        messages = as_messages(prompt, "user")
        if self.config.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system}, *messages]
        return messages
