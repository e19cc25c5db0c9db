"""`LegalNames`: metric and parameter names as a backend accepts them; different names stay different."""

from __future__ import annotations

import hashlib
import re


class LegalNames:
    """Maps names to legal ones; a legal name stays as it is.

    Args:
        illegal: matches what is not allowed; it is replaced by "_".
        longest: characters of a name; None = any number.
    """

    def __init__(self, illegal: str, longest: int | None = None) -> None:
        self._illegal = re.compile(illegal)
        self._longest = longest
        self._legal: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name not in self._legal:
            legal = self._illegal.sub("_", name) or "_"
            too_long = self._longest is not None and len(legal) > self._longest
            if too_long or legal in self._legal.values():
                # A digest of the name alone, so that a resumed run maps it to the same name.
                digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=4).hexdigest()
                legal = f"{legal[: self._longest - 9 if self._longest else None]}_{digest}"
            self._legal[name] = legal
        return self._legal[name]
