"""Templates of requests and paths into answers: ``{prompt}`` in texts of a JSON value, ``data.*.score`` out of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_rl.batch import Sample
from megatron_rl.rewards.truth import answer_text

FIELD = re.compile(r"\{(prompt|response|answer|text)\}")
LIST_FIELD = re.compile(r"\{(prompts|responses|answers|texts)\}")
STEP = re.compile(r"[^.\[\]]+")


def fill(template: Any, sample: Sample, text: str = "") -> Any:
    """``template`` with {prompt}, {response}, {answer} and {text} replaced in every string of it; other braces stay.

    Filled-in text is not substituted again: a response that contains "{answer}" stays as it is.
    """
    values = {
        "prompt": sample.prompt.text,
        "response": sample.response_text,
        "answer": answer_text(sample.prompt.answer),
        "text": text,
    }
    return _map_strings(template, lambda found: FIELD.sub(lambda match: values[match[1]], found))


def fill_lists(template: Any, samples: Sequence[Sample], texts: Sequence[str]) -> Any:
    """``template`` with each string that is exactly "{prompts}", "{responses}", "{answers}" or "{texts}" replaced by
    that list."""
    lists = {
        "{prompts}": [s.prompt.text for s in samples],
        "{responses}": [s.response_text for s in samples],
        "{answers}": [s.prompt.answer for s in samples],
        "{texts}": list(texts),
    }
    return _map_strings(template, lambda found: lists.get(found, found))


def takes_lists(template: Any) -> bool:
    """Whether a template asks for several samples in one request."""
    found: list[str] = []
    _map_strings(template, found.append)
    return any(LIST_FIELD.fullmatch(text) for text in found)


def look_up(answer: Any, path: str) -> Any:
    """The value at ``path`` ("scores.0", "data[*].score", "$" for the whole); ``*`` gives a list.

    Raises:
        LookupError: there is none; the message says how far the path led.
    """
    return _walk(answer, STEP.findall(path.removeprefix("$")), "$")


def _walk(value: Any, steps: list[str], seen: str) -> Any:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if step == "*":
        if not isinstance(value, list):
            raise LookupError(f"{seen} is {type(value).__name__}, not a list")
        return [_walk(item, rest, f"{seen}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, dict) and step in value:
        return _walk(value[step], rest, f"{seen}.{step}")
    if isinstance(value, list) and step.lstrip("-").isdigit() and -len(value) <= int(step) < len(value):
        return _walk(value[int(step)], rest, f"{seen}[{step}]")
    raise LookupError(f"{seen} has no {step!r}")


def _map_strings(template: Any, change: Any) -> Any:
    if isinstance(template, str):
        return change(template)
    if isinstance(template, dict):
        return {name: _map_strings(value, change) for name, value in template.items()}
    if isinstance(template, list | tuple):
        return [_map_strings(value, change) for value in template]
    return template
