r"""`TokenNames`: does a regular expression name a special token?

``(?s)<think>.*</think>`` and ``</?(think|answer)>`` name ``</think>``; ``.*`` and ``[^<]+`` name nothing.
A token is named when a part of the pattern without wildcards matches all of it.
"""

from __future__ import annotations

import re

# What ends a part: classes of characters, repetition without bound, lookarounds' and groups' heads.
WILDCARD = re.compile(
    r"\\[wWsSdDbBAZ\d]|\.|[*+]|\[\^[^\]]*\]|\{[^}]*\}|\(\?(?:[aiLmsux-]+[):]|P?<[^>]*>|[=!:]|<[=!])|[\^$]"
)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
LONGEST_PART = 80  # characters; a longer one is searched for the token's own text only


class TokenNames:
    """Called with a token's text, says whether ``pattern`` names it."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern = pattern
        self.parts = [part for part in _split(pattern.pattern) if part]
        self._known: dict[str, bool] = {}

    def __call__(self, token: str) -> bool:
        if token not in self._known:
            self._known[token] = any(self._names(part, token) for part in self.parts)
        return self._known[token]

    def _names(self, part: str, token: str) -> bool:
        if token in ESCAPE.sub(r"\1", part):
            return True
        if len(part) > LONGEST_PART:
            return False
        spans = ((start, stop) for start in range(len(part)) for stop in range(len(part), start + 1, -1))
        return any(self._matches(part[start:stop], token) for start, stop in spans)

    def _matches(self, part: str, token: str) -> bool:
        try:
            return re.compile(part, self.pattern.flags & ~re.DEBUG).fullmatch(token) is not None
        except re.error:  # half a group is no pattern
            return False


def _split(pattern: str) -> list[str]:
    """The pattern's parts between wildcards; an escaped character is no wildcard."""
    parts, done, position = [], 0, 0
    while position < len(pattern):
        found = WILDCARD.match(pattern, position)
        if found is not None:
            parts.append(pattern[done:position])
            done = position = found.end()
        else:
            position += 2 if pattern[position] == "\\" else 1
    return [*parts, pattern[done:]]
