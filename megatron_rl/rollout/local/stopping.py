"""When a completion ends: stop tokens as a table, stop texts by incremental decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch


class TextDecoder(Protocol):
    """The one method of a tokenizer that stop texts need."""

    def decode(self, token_ids: list[int], /) -> str: ...


def stop_table(token_ids: Iterable[int], vocab: int, device: torch.device) -> torch.Tensor:
    """``[vocab]`` bool: which tokens end a completion."""
    table = torch.zeros(vocab, dtype=torch.bool)
    known = [token for token in token_ids if 0 <= token < vocab]
    table[known] = True
    return table.to(device)


class StopText:
    """Watches one completion for stop texts, decoding each token once in its context.

    A tokenizer decodes a token differently alone than after others, and a character may span several tokens; so the new
    text is the difference between two decodings of a short window, and a window ending inside a character waits
    (the scheme of text-generation-inference's `decode_token`).
    """

    def __init__(self, stops: Sequence[str], tokenizer: TextDecoder) -> None:
        self._stops, self._tokenizer = stops, tokenizer
        self._longest = max(map(len, stops))
        self._tokens: list[int] = []
        self._window = self._read = 0
        self._tail = ""

    def push(self, token: int) -> str | None:
        """Take one more token; the stop text that it completes, if any."""
        self._tokens.append(token)
        known = self._tokenizer.decode(self._tokens[self._window : self._read])
        text = self._tokenizer.decode(self._tokens[self._window :])
        if text.endswith("\ufffd"):
            return None
        fresh = text[len(known) :]
        self._window, self._read = self._read, len(self._tokens)
        self._tail = (self._tail + fresh)[-(self._longest - 1 + len(fresh)) :] if fresh else self._tail
        return next((stop for stop in self._stops if stop in self._tail), None)
