"""Exact, number and pattern rewards, and the parsing of answers behind them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_rl.batch import Prompt, Sample
from megatron_rl.rewards import ExactReward, NumberReward, RegexReward, RewardError, final_answer, ground_truth
from megatron_rl.rewards.answers import all_numbers, plain_number
from megatron_rl.rewards.reward import Reward


def score(reward: Reward, response: str, answer: object) -> float:
    return reward([Sample(Prompt([1], answer=answer), [2], [0.0], response_text=response)])[0]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("5-3", [5, 3]),
        ("5 - 3 = 2", [5, 3, 2]),
        ("x = -3", [-3]),
        ("(-3)", [-3]),
        ("$1,234,567.50 or 1,23", ["1234567.5", 1, 23]),
        ("about .5, not 0.25.", ["1/2", "1/4"]),
        ("18.", [18]),
        ("1e3 and 2E-2", [1000, "1/50"]),
        ("1e999999999", None),  # parses to something, quickly
        ("3/4", [3, 4]),
        ("no digits, only . and - and ,", []),
        ("v2 of 10%", [2, 10]),
        (r"1\,080 or 1{,}081", [1080, 1081]),
        ("\u22123", [-3]),
    ],
)
def test_numbers_in_text(text: str, numbers: list | None) -> None:
    found = all_numbers(text)
    assert numbers is None or found == [Fraction(n) for n in numbers]


def test_endless_digits_are_not_a_number() -> None:
    assert all_numbers("9" * 100_000 + " 7") == [7]
    assert plain_number("9" * 100_000) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,000.", 1000),
        (" -2.50 ", "-5/2"),
        ("-$3", -3),
        (".5", "1/2"),
        ("1/2", None),
        ("", None),
        ("$", None),
        ("12 apples", None),
        (r"1\,080", 1080),
        (r"\text{1e+16}.", 10**16),
        ("1 08", None),
    ],
)
def test_plain_number(text: str, number: object) -> None:
    assert plain_number(text) == (None if number is None else Fraction(str(number)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        ("work\n#### 1,000\nmore", "1,000"),
        (r"\boxed{unclosed", None),
        ("####", None),
        ("nothing marked", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_ground_truth_of_gsm8k() -> None:
    assert ground_truth("48/2 = <<48/2=24>>24\n#### 72") == "72"
    assert ground_truth(72) == "72"


def test_exact() -> None:
    assert score(ExactReward(), " 42\n", 42) == 1.0
    assert score(ExactReward(), "42.", 42) == 0.0
    assert score(ExactReward(), "Yes", "yes") == 0.0
    assert score(ExactReward(ExactReward.Config(ignore_case=True)), "Yes", "yes") == 1.0


def test_number() -> None:
    assert score(NumberReward(), "3 + 4 = 7.", "so it is\n#### 7") == 1.0
    assert score(NumberReward(), "7 = 3 + 4", 7) == 0.0
    assert score(NumberReward(NumberReward.Config(which="first")), "7 = 3 + 4", 7) == 1.0
    assert score(NumberReward(), "no idea", 7) == 0.0
    assert score(NumberReward(), "0.1", "0.10") == 1.0
    assert score(NumberReward(), "3.14", "3.14159") == 0.0
    assert score(NumberReward(NumberReward.Config(tolerance=0.01)), "3.14", "3.14159") == 1.0


def test_regex() -> None:
    found = RegexReward(RegexReward.Config(pattern=r"(?s)<think>.*</think>"))
    assert score(found, "<think>\nhm\n</think> 7", None) == 1.0
    assert score(found, "7", None) == 0.0
    compared = RegexReward(RegexReward.Config(pattern=r"= *(\d+)", compare=True))
    assert score(compared, "1+1=2, 2+5 = 7", 7) == 1.0
    assert score(compared, "2+5 = 7, 7+1=8", 7) == 0.0
    whole = RegexReward(RegexReward.Config(pattern=r"\d+", whole=True))
    assert [score(whole, text, None) for text in ("12\n", "12 apples")] == [1.0, 0.0]


@pytest.mark.parametrize(
    "reward", [ExactReward(), NumberReward(), RegexReward(RegexReward.Config(pattern="(x)", compare=True))]
)
@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_prompt_without_answer_is_an_error_that_says_what_to_set(reward: Reward, answer: object) -> None:
    with pytest.raises(RewardError, match=r"set data.answer to the column"):
        score(reward, "x", answer)


def test_an_answer_without_number_is_an_error_for_the_number_reward() -> None:
    with pytest.raises(RewardError, match="the answer 'seven' holds none"):
        score(NumberReward(), "7", "seven")
