r"""Finding answers in text: ``#### 42``, ``\boxed{42}``, the last number; and numbers as exact fractions.

Typography (``1\,080``, ``\text{...}``, ``**18**``, a full stop) is undone here; mathematics is left to math-verify.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

GSM8K_MARK = "####"  # openai/grade-school-math: the final answer follows this mark
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")

# A minus belongs to the number unless something to subtract from stands before it ("5-3" holds 5 and 3). The exponent
# is short so that "1e999999999" cannot ask for a gigabyte of digits.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
)
MAX_DIGITS = 400  # of one number; longer ones are noise, and Python refuses to parse more than 4300

# What LaTeX and typographers put between groups of three digits, besides the comma.
DIGIT_GAP = re.compile(r"(?<=\d)(?:,?\\[,!;: ]|\{,\}|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
PLAIN_NUMBER = re.compile(
    r"\s*(?:\\?[$€£¥]\s*)?([-+]?)\s*(?:\\?[$€£¥]\s*)?"
    r"((?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?)((?:[eE][-+]?\d{1,3})?)\s*"
)
FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt|normal)|mbox|hbox|boldsymbol|bm|operatorname)"
    r"\s*\{([^{}]*)\}"
)
SPACE = re.compile(r"\\(?:[,;:! ]|q?quad(?![A-Za-z]))|~|[\u00a0\u2009\u202f]")
DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ('"', '"'),
)
TRAILING = ".,;:!"

DEGREE = re.compile(r"\s*(?:°|\^\s*(?:\\circ|\{\s*\\circ\s*\}))")
# A unit is up to four plain words behind the number; the words here change the number or add another.
UNIT = re.compile(r"(.*[\d.])\s+((?:[A-Za-z]{2,}|[msghL])(?:[\s/]+[A-Za-z]+){0,3})(?:\^\{?[23]\}?)?", re.DOTALL)
NO_UNIT = re.compile(
    r"\b(?:and|or|to|times|plus|minus|over|is|if|pi|sqrt|frac|mod|percent|pct|hundred|thousand|million|billion|trillion|dozen|half|"
    r"halves|thirds?|quarters?|fourths|fifths|sixths|eighths|tenths|hundredths|thousandths)\b",
    re.IGNORECASE,
)
SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][-+]?\d{1,3}(?!\w)")


def final_answer(text: str) -> str | None:
    r"""The answer that a response marks as final: the last ``\boxed{...}``, or the line after a later ``####``.

    None where nothing is marked, or what is marked is cut off; "" where the mark holds nothing.
    """
    boxes = list(BOX.finditer(text))
    mark = text.rfind(GSM8K_MARK)
    if boxes and boxes[-1].start() > mark:
        return _boxed(text, boxes)
    if mark >= 0:
        lines = text[mark + len(GSM8K_MARK) :].strip().splitlines()
        return lines[0].strip() if lines else None
    return None


def marks_answer(text: str) -> bool:
    """Whether a response marks a final answer, be it an empty one."""
    return GSM8K_MARK in text or BOX.search(text) is not None


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None when there is none."""
    numbers = all_numbers(text)
    return numbers[-1] if numbers else None


def all_numbers(text: str) -> list[Fraction]:
    r"""Every number in ``text``, in order: "1,234.5" and ``1\,234`` are one number each, "5-3" two."""
    found = (match.group() for match in NUMBER.finditer(join_digits(text)))
    return [Fraction(number.replace(",", "")) for number in found if len(number) <= MAX_DIGITS]


def plain_number(text: str) -> Fraction | None:
    r"""``text`` as a number when it is nothing but one ("$1,000.", "-2.50", ``1\,080``, "1e16"); else None."""
    if len(text) > MAX_DIGITS:
        return None
    match = PLAIN_NUMBER.fullmatch(plain_text(join_digits(text)))
    if match is None or not match.group(2):
        return None
    sign, digits, exponent = match.groups()
    return Fraction(sign + digits.replace(",", "").replace(" ", "") + exponent)


def quantity(text: str) -> tuple[Fraction, str] | None:
    r"""``text`` as a number and its unit ("18 dollars", ``90^\circ``, ``10 \text{ cm}^2``); None when it is not that.

    The unit is "" where there is none. Two quantities of different units are not comparable here.
    """
    number = plain_number(text)
    if number is not None:
        return number, ""
    if len(text) > MAX_DIGITS:
        return None
    plain = plain_text(join_digits(text))
    without = DEGREE.sub("", plain)
    if without != plain:
        number = plain_number(without)
        return None if number is None else (number, "degrees")
    match = UNIT.fullmatch(plain)
    if match is None or NO_UNIT.search(match[2]):
        return None
    number = plain_number(match[1])
    return None if number is None else (number, plain.removeprefix(match[1]).strip().casefold())


def join_digits(text: str) -> str:
    r"""``text`` with typographic minus signs and without gaps inside numbers: ``1\,080`` becomes 1080."""
    return DIGIT_GAP.sub("", text.replace("\u2212", "-"))


def spell_out(text: str) -> str:
    r"""``text`` as math-verify reads it: "1e3" becomes 1000, 90° becomes ``90^\circ``, digits are joined."""
    text = SCIENTIFIC.sub(lambda found: format(Decimal(found.group()), "f"), join_digits(text))
    return text.replace("°", r"^\circ ")


def plain_text(text: str) -> str:
    r"""``text`` without fonts (``\text{E}``), delimiters around all of it (``$E$``, ``**E**``) and stops behind it."""
    before = None
    while before != text:
        before = text
        text = " ".join(SPACE.sub(" ", FONT.sub(r"\1", text)).split())
        text = text.rstrip(TRAILING + " ") if not text.endswith(r"\.") else text
        for left, right in DELIMITERS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner and right not in inner:
                text = inner.strip()
    return text


def _boxed(text: str, boxes: list[re.Match[str]]) -> str | None:
    r"""What the last box holds; boxes in a row (``\boxed{2}, \boxed{3}``, "and" between them) are one list."""
    inside, start = _content(text, boxes[-1])[0], boxes[-1].start()
    for box in reversed(boxes[:-1]):
        content, end = _content(text, box)
        if not inside or not content or re.fullmatch(r"[\s$]*(?:,|and|,\s*and)[\s$]*", text[end:start]) is None:
            break
        inside, start = f"{content}, {inside}", box.start()
    return inside


def _content(text: str, box: re.Match[str]) -> tuple[str | None, int]:
    r"""What one box holds, and where it ends; ``\boxed 5`` needs no braces."""
    if text[box.end() : box.end() + 1] != "{":
        bare = re.compile(r"[^\s{}$\\]*").match(text, box.end())
        assert bare is not None  # it may be empty
        return bare.group(), bare.end()
    depth, position = 0, box.end()
    while position < len(text):
        if text[position] == "\\":  # an escaped brace is text
            position += 1
        else:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
        if depth == 0:
            inside = text[box.end() + 1 : position - 1].strip()
            return re.sub(r"(?<!\\)\\$", "", inside), position  # of a "\\ " at its end
    return None, len(text)
