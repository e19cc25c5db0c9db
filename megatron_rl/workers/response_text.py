"""`ResponseDecoder`: a response's token ids as text, and the positions of special tokens in it.

Rewards read text without special tokens. Those that a reward needs can be put back (`Sample.text_with`), and those
that `RolloutConfig.special_tokens` names stay for all of them. EOS and padding are never shown.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from megatron_rl.batch import Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.rollout.base import Completion


class ResponseDecoder:
    """Decodes with one tokenizer.

    Args:
        hidden: ids of tokens that are never shown: end of sequence and padding.
        kept: texts of special tokens that stay in the text.

    Raises:
        ConfigError: ``kept`` has a text that is not a special token of this tokenizer, or is never shown.
    """

    def __init__(self, tokenizer: Any, hidden: Collection[int], kept: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        # A custom tokenizer needs only `decode`.
        added = getattr(tokenizer, "added_tokens_decoder", {})
        names = {number: token.content for number, token in added.items() if token.special}
        special = getattr(tokenizer, "all_special_ids", [])
        names |= {number: tokenizer.convert_ids_to_tokens(number) for number in special if number not in names}
        shown = {number: name for number, name in names.items() if number not in hidden}
        for name in kept:
            if name not in shown.values():
                raise ConfigError(
                    f"rollout.special_tokens names {name!r}, expected special tokens of the tokenizer other than EOS "
                    f"and padding, which are never shown: {', '.join(sorted(shown.values())[:20]) or 'it has none'}"
                )
        self.kept = {number for number, name in shown.items() if name in kept}
        self.left_out = {number: name for number, name in shown.items() if number not in self.kept}
        self._special = frozenset(names)

    def __call__(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, str]]]:
        """The text, and (offset in it, text) of each special token that is left out of it."""
        places = [place for place, number in enumerate(token_ids) if number in self.left_out]
        offsets = [(len(self._text(token_ids[:place])), self.left_out[token_ids[place]]) for place in places]
        return self._text(token_ids), offsets

    def sample(self, prompt: Prompt, completion: Completion, group: int) -> Sample:
        """An engine's answer to ``prompt``, which is number ``group`` of its batch."""
        text, special_tokens = self(completion.token_ids)
        return Sample(
            prompt=prompt,
            response_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            response_text=text,
            special_tokens=special_tokens,
            finish_reason=completion.finish_reason,
            policy_version=completion.policy_version,
            policy_version_spans=completion.policy_version_spans,
            group=group,
            metadata=dict(completion.metadata),
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        if self.kept.isdisjoint(token_ids):
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)
        ids = [number for number in token_ids if number in self.kept or number not in self._special]
        return self.tokenizer.decode(ids, skip_special_tokens=False)
