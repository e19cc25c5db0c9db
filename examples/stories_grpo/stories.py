"""Openings of children's stories with a named hero, and a reward for telling the story about that hero.

`python examples/stories_grpo/stories.py FOLDER` writes FOLDER/train.jsonl and FOLDER/heldout.jsonl; no name is in both.
"""

import json
import re
import sys
from pathlib import Path

TRAIN = {
    "girl": ["Lily", "Lucy", "Sue", "Sara", "Amy", "Jane", "Molly", "Kate"],
    "boy": ["Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Bob", "John"],
}
HELD_OUT = {"girl": ["Mia", "Anna", "Emma"], "boy": ["Leo", "Billy", "Fred"]}
OPENINGS = (
    "Once upon a time, there was a little {kind} named {name}.",
    "One day, a {kind} named {name} went to the park.",
    "There was a happy {kind} named {name}.",
    "Once there was a {kind} called {name}.",
)


def names_hero_twice(sample) -> float:
    """1 when the hero's name stands at least twice in the continuation, as a word of its own; otherwise 0."""
    hero = re.escape(sample.prompt.answer)
    return float(len(re.findall(rf"\b{hero}\b", sample.response_text)) >= 2)


def rows(heroes: dict[str, list[str]]) -> list[dict[str, str]]:
    return [
        {"prompt": opening.format(kind=kind, name=name), "answer": name}
        for kind, names in heroes.items()
        for name in names
        for opening in OPENINGS
    ]


def write_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, heroes in (("train", TRAIN), ("heldout", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(heroes))) + "\n")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
