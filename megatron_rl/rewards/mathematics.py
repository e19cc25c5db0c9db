r"""`MathReward`: is the response's final answer mathematically equal to the ground truth?

Understands GSM8K ("#### 42"), ``\boxed{...}`` and LaTeX. Plain numbers are compared here, exactly; everything else goes
to math-verify in a child process (`verifier.py`), so that a response like ``9^{9^{9^9}}`` costs its time limit and no
more.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_rl.batch import Sample
from megatron_rl.config import ConfigRecord
from megatron_rl.rewards.answers import final_answer, marks_answer, plain_text, quantity, spell_out
from megatron_rl.rewards.reward import REWARDS, NoReward, Reward
from megatron_rl.rewards.truth import answer_of, required_truth
from megatron_rl.rewards.verifier import Verifier

logger = logging.getLogger(__name__)

WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'-])*")
CHOICE = re.compile(r"\(?([A-Za-z])\)?")
LABELLED_CHOICE = re.compile(r"(?:(?i:option|choice|answer)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])[).:])(?:\s.*)?", re.DOTALL)
STATED = re.compile(r"(?i:answer|option|choice)\**(?:\s+is\b|\s*[:=])\s*:?\s*([^\n]+?)\s*(?=[.!]?\**\s*$|[.!]\**\s|\n)")
# "The answer is E because ..."; "A" and "I" may be words.
REASONED_CHOICE = re.compile(r"\(?([B-HJ-Z])\)?\s.*|\(?([AI])\)?,?\s(?:because|since|as|for)\b.*", re.DOTALL)
LONE_CHOICE = re.compile(r"\(([A-Z])\)")
SYMBOLS = {"pi": r"\pi", "infinity": r"\infty", "inf": r"\infty"}  # words that are mathematics


@REWARDS.register("math")
class MathReward(Reward):
    """1 when math-verify finds the answers equal, else 0. Safe to call from several threads.

    An answer that cannot be checked within the time limit counts as wrong, or its sample is dropped (``on_timeout``);
    either way ``sample.metadata["math_timeout"]`` says so, and the metric ``math/NAME/timeouts_count`` counts it.
    """

    class Config(ConfigRecord):
        """Limits of the check."""

        seconds: float = Field(default=6.0, gt=0)
        """CPU time limit of one comparison."""
        on_timeout: Literal["wrong", "drop"] = "wrong"
        """An answer that takes longer: wrong (reward 0), or a sample without a reward, which is dropped."""
        tail_chars: int = Field(default=2000, ge=1)
        """Where a response marks no final answer, its last so many characters are searched."""

    package: ClassVar[str] = "math_verify"
    once_per_replica = True  # near the time limit two ranks could judge the same answer differently

    def __init__(self, config: Config | None = None, name: str = "math") -> None:
        self.config = config or self.Config()
        self.name = name
        self.num_timeouts = 0
        self._verifier = Verifier(self.config.seconds)
        self._lock = threading.Lock()

    def check_answer(self, answer: Any) -> None:
        required_truth(self.name, answer)

    def score_one(self, sample: Sample) -> float | NoReward:
        truth, response = answer_of(self.name, sample), sample.response_text
        marked = final_answer(response)
        if marks_answer(response) and not plain_text(marked or ""):
            return 0.0  # an empty or unfinished mark: what stands before it was not meant as the answer
        decided = by_rule(truth, marked, response)
        if decided is not None:
            return float(decided)
        given = f"\\boxed{{{marked}}}" if marked else response[-self.config.tail_chars :]
        return self._verified(as_latex(truth), spell_out(given), sample)

    def _verified(self, truth: str, response: str, sample: Sample) -> float | NoReward:
        with self._lock:
            equal = self._verifier.equal(truth, response)
        if equal is None:
            self.num_timeouts += 1
            sample.metadata["math_timeout"] = True
            what = f"answer not checked within {self.config.seconds} s of CPU time: {response[-80:]!r}"
            logger.warning("%s; %s", what, self.config.on_timeout)
            if self.config.on_timeout == "drop":
                return NoReward(what)
        return float(bool(equal))

    def take_metrics(self) -> dict[str, float]:
        found, self.num_timeouts = self.num_timeouts, 0
        return {f"math/{self.name}/timeouts_count": float(found)}

    def close(self) -> None:
        """End the child process; the next comparison starts another."""
        self._verifier.close()


def by_rule(truth: str, marked: str | None, response: str) -> bool | None:
    """The verdict where none of it is mathematics: numbers, quantities, choices and words; else None."""
    expected = plain_text(truth)
    if marked and plain_text(marked) == expected:
        return True
    if is_choice(expected):  # A to E, but also the variable x
        return choice(marked, response) == choice_letter(expected)
    if WORDS.fullmatch(expected) and expected.casefold() not in SYMBOLS:
        # "yes", "no solution": to math-verify these are products of letters
        given = plain_text(marked or stated_answer(response) or response)
        return given.casefold() == expected.casefold()
    wanted, given_quantity = quantity(truth), quantity(marked) if marked else None
    if wanted is None or given_quantity is None:
        return None
    if wanted[1] and given_quantity[1] and wanted[1] != given_quantity[1]:
        return None
    return wanted[0] == given_quantity[0]


def is_choice(text: str) -> bool:
    """Whether ``text`` is the letter of a choice: "E", "(E)" or "E)"."""
    return CHOICE.fullmatch(text) is not None


def choice_letter(text: str) -> str | None:
    """The letter at the head of "E", "(E)", "E) 42", "(E) 42" and "Option E"; None when there is none."""
    found = CHOICE.fullmatch(text) or LABELLED_CHOICE.fullmatch(text)
    return found[found.lastindex or 1].upper() if found else None


def choice(marked: str | None, response: str) -> str | None:
    """The letter that a response chooses: marked as final, or the whole response, or what it says the answer is."""
    if marked:
        return choice_letter(plain_text(marked))
    stated = plain_text(stated_answer(response) or "")
    found = choice_letter(plain_text(response)) or choice_letter(stated)
    if found is not None:
        return found
    reasoned = REASONED_CHOICE.fullmatch(stated)
    if reasoned is not None:
        return reasoned.group(reasoned.lastindex or 1)
    lone = set(LONE_CHOICE.findall(response)) if not stated else set()
    return lone.pop() if len(lone) == 1 else None


def stated_answer(response: str) -> str | None:
    """What follows the last "answer is", "answer:" or "option" of a response, to the end of its sentence."""
    found = list(STATED.finditer(response))
    return found[-1][1] if found else None


def as_latex(truth: str) -> str:
    """``truth`` in the form in which math-verify reads all of it: in dollars or in a box."""
    symbol = SYMBOLS.get(plain_text(truth).casefold())
    if symbol is not None:
        return f"${symbol}$"
    truth = spell_out(truth).replace("\\$", "")
    return truth if "$" in truth or "\\boxed" in truth else f"${truth}$"
