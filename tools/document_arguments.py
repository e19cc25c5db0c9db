"""Writes docs/megatron_arguments.md from the allow-list: what is taken over of a Megatron model, and what is refused.

python tools/document_arguments.py      # after changing the allow-list; a test compares the file
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import megatron_rl  # noqa: F401  installs the CPU face
from megatron_rl.engines.megatron.adopted_architecture import ARGUMENTS
from megatron_rl.engines.megatron.hybrid_model import HYBRID_ARGUMENTS
from megatron_rl.models.megatron_fields import FREE, NEUTRAL, NEUTRAL_WITH_EXPERTS, TAKEN, Neutral

TARGET = Path(__file__).resolve().parents[1] / "docs" / "megatron_arguments.md"

INTRODUCTION = """# Supported arguments of Megatron models

<!-- Written by tools/document_arguments.py from megatron_fields.py (models), adopted_architecture.py (engines) and
hybrid_model.py (engines). -->

`Actor(model=chunks, ...)` and the other workers take over a job's own `GPTModel` or `HybridModel`, or refuse it by name
before anything is trained. A field of `TransformerConfig` that stands nowhere on this page, from another version of
Megatron-Core or a subclass, must have its default.
"""


def main() -> None:
    TARGET.write_text(document())


def document() -> str:
    """The whole page."""
    return "\n".join(
        [
            INTRODUCTION,
            table("Arguments of `GPTModel`", ("argument", "what becomes of it"), ARGUMENTS.items()),
            table("Arguments of `HybridModel` alone", ("argument", "what becomes of it"), HYBRID_ARGUMENTS.items()),
            table("Fields taken over", ("field", "in the Hugging Face config"), TAKEN.items()),
            table("Fields that must have one value, else refused", ("field", "must be"), required(NEUTRAL)),
            table("The same, of a mixture of experts", ("field", "must be"), required(NEUTRAL_WITH_EXPERTS)),
            "## Fields that may have any value\n",
            *(f"- {reason}: {', '.join(f'`{name}`' for name in names.split())}" for reason, names in FREE.items()),
            "",
        ]
    )


def required(rules: dict[str, Neutral]) -> Iterable[tuple[str, str]]:
    return ((name, f"`{rule.expected}`") for name, rule in rules.items())


def table(title: str, header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"## {title}", "", f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in rows), ""])


if __name__ == "__main__":
    main()
