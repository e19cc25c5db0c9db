r"""Finding answers in text: ``#### 42``, ``\boxed{42}``, the last number; and numbers as exact fractions."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

GSM8K_MARK = "####"  # openai/grade-school-math: the final answer follows this mark
BOXED = re.compile(r"\\(?:boxed|fbox)\s*{")

# A minus belongs to the number unless something to subtract from stands before it ("5-3" holds 5 and 3). The exponent
# is short so that "1e999999999" cannot ask for a gigabyte of digits.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
)
PLAIN_NUMBER = re.compile(r"\s*\$?\s*([-+]?)\s*\$?\s*((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)\s*\.?\s*")
MAX_DIGITS = 400  # of one number; longer ones are noise, and Python refuses to parse more than 4300


def ground_truth(answer: Any) -> str:
    """The answer to compare with: what follows the last ``####``, else the whole, stripped."""
    text = str(answer)
    return text.rsplit(GSM8K_MARK, 1)[-1].strip()


def final_answer(text: str) -> str | None:
    r"""The answer that a response marks as final: the last ``\boxed{...}``, else the line after the last ``####``."""
    boxes = list(BOXED.finditer(text))
    if boxes:
        inside = _balanced(text, boxes[-1].end())
        if inside is not None:
            return inside.strip()
    if GSM8K_MARK in text:
        lines = text.rsplit(GSM8K_MARK, 1)[-1].strip().splitlines()
        return lines[0].strip() if lines else None
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None when there is none."""
    numbers = all_numbers(text)
    return numbers[-1] if numbers else None


def all_numbers(text: str) -> list[Fraction]:
    """Every number in ``text``, in order: "1,234.5" is one number, "5-3" two."""
    found = (match.group() for match in NUMBER.finditer(text))
    return [Fraction(number.replace(",", "")) for number in found if len(number) <= MAX_DIGITS]


def plain_number(text: str) -> Fraction | None:
    """``text`` as a number when it is nothing but one ("$1,000.", "-2.50"); else None."""
    match = PLAIN_NUMBER.fullmatch(text)
    if match is None or not match.group(2) or len(text) > MAX_DIGITS:
        return None
    return Fraction(match.group(1) + match.group(2).replace(",", ""))


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
