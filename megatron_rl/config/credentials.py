"""Credentials do not belong into logs, copies of the configuration or error messages: `masked` takes them out.

It is applied where text leaves the program (log handler, error line, config.yaml, parameters of trackers, `--check`);
the parts themselves keep the real values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

# user:password@host, or a token alone before the @; the user's name stays.
_USERINFO = re.compile(
    r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^\s/@:'\"?#]*)(?P<rest>:(?!\d+/)[^\s'\"]*)?@"
)
_WORD = (
    r"[\w-]*(?:password|passwd|passphrase|secret|credential|authorization|(?:auth|access|bearer|api|hf)[_-]?token"
    r"|api[_-]?key|access[_-]?key|private[_-]?key)[\w-]*"
)
_KEY = rf"(?:{_WORD}|pwd|sig|signature|(?:[\w-]+[_-])?token|key)"  # of a query or a mapping; in prose they are words
_IN_QUERY = re.compile(rf"(?P<name>[?&;]{_KEY}=)[^\s&;#'\"]+", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?P<name>\b{_WORD}['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*|Bearer |Basic )[^\s'\",;&}}\])]+", re.IGNORECASE
)
_HEADER = re.compile(r"(?P<name>\b(?:Bearer|Basic) +)[A-Za-z0-9._~+/=-]{6,}")
_KNOWN_FORMS = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)
_SECRET_KEY = re.compile(rf"(?:{_KEY})", re.IGNORECASE)
# Keys that name where a secret is, or count tokens of text.
_NO_SECRET_KEY = re.compile(r".*_env|(?:pad|eos|bos|unk|sep|cls|mask)_token|key", re.IGNORECASE)


def masked(text: str) -> str:
    """``text`` with the credentials in it as ``***``: passwords in addresses, tokens in queries and headers, and values
    behind names like ``api_key=``."""
    text = _USERINFO.sub(_without_password, text)
    text = _IN_QUERY.sub(lambda found: found["name"] + MASK, text)
    text = _HEADER.sub(lambda found: found["name"] + MASK, text)
    text = _ASSIGNED.sub(_unless_harmless, text)
    return _KNOWN_FORMS.sub(MASK, text)


def masked_values(values: Any) -> Any:
    """Plain data with every credential masked: as `masked` in each text, and whole under a key that names one."""
    if isinstance(values, Mapping):
        return {name: _masked_entry(str(name), value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [masked_values(value) for value in values]
    return masked(values) if isinstance(values, str) else values


def _masked_entry(name: str, value: Any) -> Any:
    leaf = name.rpartition(".")[2]  # of flattened keys
    if isinstance(value, str) and value and _SECRET_KEY.fullmatch(leaf) and not _NO_SECRET_KEY.fullmatch(leaf):
        return MASK
    return masked_values(value)


def _without_password(found: re.Match[str]) -> str:
    if found["rest"] is None:
        return found["scheme"] + MASK + "@" if found["user"] else found[0]
    return f"{found['scheme']}{found['user']}:{MASK}@"


def _unless_harmless(found: re.Match[str]) -> str:
    name = re.split(r"['\"\s=:]", found["name"])[0]
    return found[0] if _NO_SECRET_KEY.fullmatch(name) else found["name"] + MASK
