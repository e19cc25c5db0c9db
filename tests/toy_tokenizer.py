"""A character tokenizer with BOS, EOS and a chat template: the least that the data package accepts."""

from __future__ import annotations

BOS, EOS = 1, 2


class ToyTokenizer:
    """One token a character, its code point plus ten."""

    eos_token_id: int | None = EOS

    def __init__(self, bos: bool = True) -> None:
        self.bos = bos

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * (add_special_tokens and self.bos) + [ord(c) + 10 for c in text]

    def apply_chat_template(self, messages: list, /, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        turns = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return turns + ("<assistant>" if add_generation_prompt else "")


def ids(text: str, bos: bool = False, eos: bool = False) -> list[int]:
    """What the toy tokenizer makes of ``text``, written down independently of it."""
    return [BOS] * bos + [ord(c) + 10 for c in text] + [EOS] * eos
