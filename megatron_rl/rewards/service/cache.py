"""`AnswerCache`: answers of a service on disk, one JSON line each, found again by what was asked.

Every process appends to a file of its own and reads everyone's when it starts, so that any number of ranks and runs
share a folder, on a network file system too, without locks. Half a line, left by a process that died, is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def answer_key(*parts: Any) -> str:
    """A digest of everything that the answer depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class AnswerCache:
    """Answers by key.

    Args:
        folder: created by the first `put`; None = nothing is kept, not even in memory.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._answers: dict[str, Any] | None = None

    def get(self, key: str) -> Any | None:
        """The answer, or None."""
        if self.folder is None:
            return None
        if self._answers is None:
            self._answers = self._read(self.folder)
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keep answers for this run and the next."""
        if self.folder is None or not answers:
            return
        if self._answers is None:
            self._answers = self._read(self.folder)
        self._answers.update(answers)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())
        with (self.folder / f"{socket.gethostname()}-{os.getpid()}.jsonl").open("a") as file:
            file.write(lines)

    @staticmethod
    def _read(folder: Path) -> dict[str, Any]:
        answers = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    answers[record["key"]] = record["answer"]
                except (ValueError, KeyError, TypeError):
                    continue
        return answers
