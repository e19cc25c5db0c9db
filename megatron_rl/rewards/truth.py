"""A prompt's answer as the text to compare with: strings, numbers, and the records that data sets wrap them in.

verl's ``{"ground_truth": "18", "style": "rule"}``, a list of one answer and the same as JSON text are understood. What
could mean several things is refused, when the data is loaded (`check_answers`), never compared as Python source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from numbers import Number
from typing import Any

from megatron_rl.batch import Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards.answers import GSM8K_MARK
from megatron_rl.rewards.reward import Reward, RewardError, describe

TRUTH_KEY = "ground_truth"  # verl's reward_model column; its other keys say how to score
SOLE_KEYS = (TRUTH_KEY, "answer", "final_answer", "solution", "target", "label", "value")  # of a record with one key


def ground_truth(answer: Any) -> str:
    """The answer to compare with: what follows the last ``####``, else the whole, stripped; "" when there is none.

    Raises:
        ValueError: it is neither one text nor one number, nor a known wrapping of these.
    """
    return _unwrapped(answer).rsplit(GSM8K_MARK, 1)[-1].strip()


def answer_text(answer: Any) -> str:
    """The answer as a service reads it: unwrapped as by `ground_truth`, or as JSON where it has another structure."""
    try:
        return _unwrapped(answer)
    except ValueError:
        return json.dumps(answer, ensure_ascii=False, default=str)


def answer_of(name: str, sample: Sample) -> str:
    """The ground truth of the sample's prompt, for the reward ``name``.

    Raises:
        RewardError: the prompt has none, or one that is not understood.
    """
    try:
        return required_truth(name, sample.prompt.answer)
    except ValueError as error:
        raise RewardError(f"{error}; sample: {describe(sample)}") from None


def required_truth(name: str, answer: Any) -> str:
    """`ground_truth` of an answer that reward ``name`` cannot do without.

    Raises:
        ValueError: there is none, or it is not understood.
    """
    try:
        truth = ground_truth(answer)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from None
    if not truth:
        raise ValueError(
            f"reward {name!r} needs an answer to compare with, and the prompt has none: set data.answer to the column "
            f"that holds it"
        )
    return truth


def check_answers(reward: Reward, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError where ``reward`` cannot be computed for the answer of one of these prompts."""
    for prompt in prompts:
        try:
            reward.check_answer(prompt.answer)
        except ValueError as error:
            raise ConfigError(f"row {prompt.index} of the data: {error}") from None


def _unwrapped(answer: Any) -> str:
    if hasattr(answer, "tolist"):  # of Parquet and NumPy
        answer = answer.tolist()
    if answer is None:
        return ""
    if isinstance(answer, str):
        inner = _from_json(answer)
        return answer if inner is None else _unwrapped(inner)
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"the answer is {answer}, expected text or a finite number")
    if isinstance(answer, Number):
        return str(answer)
    if isinstance(answer, dict):
        if TRUTH_KEY in answer or (len(answer) == 1 and next(iter(answer)) in SOLE_KEYS):
            return _unwrapped(answer.get(TRUTH_KEY, next(iter(answer.values()))))
        keys = ", ".join(map(repr, list(answer)[:6]))
        raise ValueError(
            f"the answer is a record of {keys or 'nothing'}, expected text, a number, or a record with {TRUTH_KEY!r}: "
            "set data.answer to a column that holds the answer itself"
        )
    if isinstance(answer, list | tuple):
        if len(answer) == 1:
            return _unwrapped(answer[0])
        raise ValueError(
            f"the answer is a list of {len(answer)}, expected text, a number, or a list of one: which of them is right "
            "only a reward of your own can say"
        )
    raise ValueError(f"the answer is {type(answer).__name__}, expected text or a number")


def _from_json(text: str) -> Any:
    """The record or list of texts that ``text`` writes as JSON, else None: "[1, 2]" is an interval, "{1}" a set."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        return found
    return found if found and all(isinstance(item, str | dict) for item in found) else None
