r"""`MathReward`: is the response's final answer mathematically equal to the ground truth?

Understands GSM8K ("#### 42"), ``\boxed{...}`` and LaTeX. Plain numbers are compared here, exactly; everything else goes
to math-verify in a child process (`verifier.py`), so that a response like ``9^{9^{9^9}}`` costs its time limit and no
more.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import ClassVar, Literal

from pydantic import Field

from megatron_rl.batch import Sample
from megatron_rl.config import ConfigRecord
from megatron_rl.rewards.answers import final_answer, plain_number
from megatron_rl.rewards.matching import answer_of
from megatron_rl.rewards.reward import REWARDS, NoReward, Reward
from megatron_rl.rewards.verifier import Verifier

logger = logging.getLogger(__name__)

WORDS = re.compile(r"[A-Za-z][A-Za-z .'-]*")


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
        tail_chars: int = 2000
        """Where a response marks no final answer, its last so many characters are searched."""

    package: ClassVar[str] = "math_verify"
    once_per_replica = True  # near the time limit two ranks could judge the same answer differently

    def __init__(self, config: Config | None = None, name: str = "math") -> None:
        self.config = config or self.Config()
        self.name = name
        self.num_timeouts = 0
        self._verifier = Verifier(self.config.seconds)
        self._lock = threading.Lock()

    def score_one(self, sample: Sample) -> float | NoReward:
        truth = answer_of(self.name, sample)
        marked = final_answer(sample.response_text)
        expected, given = plain_number(truth), plain_number(marked) if marked else None
        if expected is not None and given is not None:
            return float(expected == given)
        if WORDS.fullmatch(truth):  # "yes", "no solution": to math-verify these are products of letters
            return float((marked or sample.response_text.strip()).casefold() == truth.casefold())
        response = f"\\boxed{{{marked}}}" if marked else sample.response_text[-self.config.tail_chars :]
        with self._lock:
            equal = self._verifier.equal(as_latex(truth), response)
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


def as_latex(text: str) -> str:
    """``text`` in the form in which math-verify reads all of it: in dollars or in a box."""
    return text if "$" in text or "\\boxed" in text else f"${text}$"
