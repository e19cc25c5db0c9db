"""Rows in the form of the public data sets that examples use, made from a seed, so that tests need no download."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random

THINGS = ("apples", "eggs", "red balls", "clips", "pages")
NAMES = ("Lily", "Tim", "Sue", "Amy", "Kate", "Jane")


def gsm8k_rows(count: int) -> list[dict[str, str]]:
    """Questions and worked answers as in GSM8K: calculations in << >>, thousands with commas, the result after ####."""
    rng, rows = Random(8), []
    for _ in range(count):
        a, b, price = rng.randint(2, 900), rng.randint(2, 12), rng.choice((1, 2, 25, 1000))
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        question = f"{name} has {a} {thing} and buys {b} times as many for ${price} each. How much does {name} pay?"
        answer = (
            f"{name} buys {a}*{b} = <<{a}*{b}={a * b}>>{a * b} {thing}.\n"
            f"That is {a * b}*${price} = $<<{a * b}*{price}={a * b * price}>>{a * b * price}.\n#### {a * b * price:,}"
        )
        rows.append({"question": question, "answer": answer})
    return rows


def preference_rows(count: int) -> list[dict[str, str]]:
    """Dialogues as in HH: the prompt ends with "Assistant:", chosen and rejected are what could follow."""
    rng, rows = Random(9), []
    for number in range(count):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        turns = "".join(f"\n\nHuman: And {n}?\n\nAssistant: {n} has {n} {thing}." for n in range(number % 4))
        prompt = f"\n\nHuman: What did {name} do with the {thing}?{turns}\n\nHuman: Tell me more.\n\nAssistant:"
        good = f" {name} was kind and shared the {thing} with {rng.choice(NAMES)}." + " They had fun." * (number % 3)
        rows.append({"prompt": prompt, "chosen": good, "rejected": f" {name} was angry and yelled \u201cno\u201d."})
    return rows


def write_gz(path: Path, rows: list[dict[str, str]], real: Path | None = None, num_real: int = 200) -> Path:
    """``rows`` as a .jsonl.gz, and after them the first of a real file of that kind, where there is one."""
    lines = [json.dumps(row) for row in rows]
    if real is not None:
        with gzip.open(real, "rt") as file:
            lines += [line.rstrip("\n") for _, line in zip(range(num_real), file, strict=False)]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path
