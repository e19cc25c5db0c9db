"""Mathematical equality: right on real GSM8K answers, bounded in time, and usable from any thread."""

from __future__ import annotations

import gzip
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_rows import gsm8k_rows

from megatron_rl.batch import Prompt, Sample
from megatron_rl.rewards import MathReward, NoReward, RewardError
from megatron_rl.rewards import verifier as verifier_module

pytest.importorskip("math_verify")

MONSTER = "9^{9^{9^{9}}}"  # math-verify would evaluate it for ever


def sample(response: str, answer: object) -> Sample:
    return Sample(Prompt([1], text="question", answer=answer), [2], [0.0], response_text=response)


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    reward = MathReward(MathReward.Config(seconds=1))
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("She pays $18.\n#### 18", "48/2=24\n#### 18", 1.0),
        ("#### 1,000", "#### 1000", 1.0),
        ("#### 17", "#### 18", 0.0),
        ("The answer is 18.", "#### 18", 1.0),
        ("I have 18 and add 1, so the answer is 19.", "#### 18", 0.0),
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"so \boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"so \boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"so \boxed{x^2+2x+2}", "(x+1)^2", 0.0),
        (r"so \boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
        ("Yes", "yes", 1.0),
        (r"\boxed{no}", "on", 0.0),  # not the product n*o
        ("", "5", 0.0),
        ("no idea", "5", 0.0),
    ],
)
def test_verdict(reward: MathReward, response: str, answer: str, expected: float) -> None:
    assert reward([sample(response, answer)]) == [expected]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        # The letter of a choice, in fonts, parentheses, sentences; hedging and other letters are wrong.
        *(
            (text, "E", 1.0)
            for text in (r"\boxed{\text{E}}", r"\boxed{(E)}", r"\boxed{E.}", r"\boxed{\textbf{(E)}\ 42}")
        ),
        *((text, "E", 1.0) for text in ("E.", "(E)", "**E**", "The answer is (E).", "Answer: E", "I would take (E).")),
        ("The answer is E because A is impossible.", "E", 1.0),
        (r"\boxed{E}", r"\text{(E)}", 1.0),
        *((text, "E", 0.0) for text in (r"\boxed{(D)}", "A or E", "(D) or (E)", "The answer is D. E is not.")),
        # A mark that holds nothing, or is cut off, is no answer: what stands before it does not count.
        *(
            (f"I get 5, no wait. {mark}", "5", 0.0)
            for mark in (r"\boxed{}", r"\boxed{ }", r"\boxed", r"\boxed{\text{}}")
        ),
        *((f"I get 5, no wait. {mark}", "5", 0.0) for mark in ("####", r"\boxed{5", r"\boxed{$$}")),
        (r"\boxed{4}, no wait. \boxed{}", "4", 0.0),
        (r"\boxed 5", "5", 1.0),
        # The later mark counts; boxes in a row are one list; braces nest.
        (r"\boxed{5}, so" + "\n#### 6", "6", 1.0),
        (r"#### the answer is \boxed{6}", "6", 1.0),
        (r"$\boxed{2}$ and $\boxed{3}$", "2,3", 1.0),
        (r"\boxed{2}, \boxed{3}", "3", 0.0),
        (r"\boxed{2}, then \boxed{3}", "3", 1.0),
        (r"\boxed{\boxed{5}}", "5", 1.0),
        (r"\boxed{\left\{1, \frac{1}{\sqrt{2}}\right\}}", r"\{1, \frac{\sqrt{2}}{2}\}", 1.0),
        # Digits, however they are grouped and written.
        *(
            (rf"\boxed{{{text}}}", "1080", 1.0)
            for text in (r"1\,080", "1{,}080", "1 080", r"1,\!080", r"\$1,080.00", "1080.")
        ),
        (r"\boxed{1\,080\,000}", 1_080_000, 1.0),
        (r"\boxed{1\,081}", "1080", 0.0),
        (r"The answer is $1\,080$.", "1080", 1.0),
        ("\\boxed{\u22125}", "-5", 1.0),
        *(
            (text, 1e16, 1.0)
            for text in (r"\boxed{10000000000000000}", r"\boxed{10^{16}}", r"\boxed{1e16}", "It is 1e16.")
        ),
        *((text, 1e16, 0.0) for text in (r"\boxed{10^{15}}", "It is 9999999999999999.", r"\boxed{16}")),
        (r"\boxed{10^{-7}}", 1e-7, 1.0),
        # Units, degrees, per cent, words.
        *(
            (rf"\boxed{{{text}}}", "18", 1.0)
            for text in ("18 dollars", r"18 \text{ cm}^2", "18 cm^2", r"18^\circ", "18°", "x=18")
        ),
        *((rf"\boxed{{{text}}}", "18", 0.0) for text in ("18 x", "18 or 19", "18 thousand", "-18", "18 and 19")),
        ("#### **18**", "18", 1.0),
        ("#### $18 dollars", r"\$18", 1.0),
        ("It is 90°.", r"90^{\circ}", 1.0),
        (r"\boxed{\dfrac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\text{No solution.}}", "no solution", 1.0),
        ("The answer is yes.", "yes", 1.0),
        ("yes and no", "yes", 0.0),
        (r"\boxed{\pi}", "pi", 1.0),
        (r"\boxed{3.14}", "pi", 0.0),
    ],
)
def test_typography_neither_hides_a_right_answer_nor_makes_one(
    reward: MathReward, response: str, answer: object, expected: float
) -> None:
    assert reward([sample(response, answer)]) == [expected]


def assert_right_beside_neighbours(answers: list[str], reward: MathReward) -> None:
    neighbours = answers[1:] + answers[:1]
    assert sum(reward([sample(answer, answer) for answer in answers])) == len(answers)
    equal = [a.split("####")[1] == b.split("####")[1] for a, b in zip(answers, neighbours, strict=True)]
    shifted = [sample(a, b) for a, b in zip(answers, neighbours, strict=True)]
    assert reward(shifted) == [float(e) for e in equal]


def spoken(answers: list[str]) -> list[Sample]:
    """Answers without their mark, which math-verify must find."""
    return [sample(f"Therefore, the answer is {a.split('####')[1].strip()}.", a) for a in answers]


def test_solutions_in_gsm8k_s_form_are_right_marked_or_spoken_and_their_neighbours_wrong(reward: MathReward) -> None:
    answers = [row["answer"] for row in gsm8k_rows(100)]
    assert any("," in answer.split("####")[1] for answer in answers)
    assert_right_beside_neighbours(answers, reward)
    assert sum(reward(spoken(answers[:30]))) == 30


def test_gsm8k_solutions_are_right_and_their_neighbours_wrong(shared_dir: Path, reward: MathReward) -> None:
    with gzip.open(shared_dir / "data" / "gsm8k_test.jsonl.gz", "rt") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert len(answers) == 1319
    assert_right_beside_neighbours(answers, reward)


def test_unmarked_gsm8k_answers_go_through_math_verify(shared_dir: Path, reward: MathReward) -> None:
    with gzip.open(shared_dir / "data" / "gsm8k_test.jsonl.gz", "rt") as file:
        answers = [json.loads(line)["answer"] for line in file][:60]
    assert sum(reward(spoken(answers))) == 60


def test_an_endless_comparison_costs_its_limit_and_is_counted() -> None:
    reward = MathReward(MathReward.Config(seconds=1))
    reward([sample("\\boxed{x}", "x^2")])  # starts the child
    started = time.monotonic()
    batch = [sample(f"\\boxed{{{MONSTER}}}", "18"), sample(r"\boxed{\frac{36}{2}}", "18")]
    assert reward(batch) == [0.0, 1.0]
    assert time.monotonic() - started < 25
    assert batch[0].metadata["math_timeout"] is True
    assert "math_timeout" not in batch[1].metadata
    assert reward.take_metrics() == {"math/math/timeouts_count": 1.0}
    assert reward.take_metrics() == {"math/math/timeouts_count": 0.0}
    reward.close()


def test_an_endless_comparison_can_be_dropped_instead_of_counted_as_wrong() -> None:
    reward = MathReward(MathReward.Config(seconds=1, on_timeout="drop"))
    endless, right = reward([sample(f"\\boxed{{{MONSTER}}}", "18"), sample(r"\boxed{\frac{36}{2}}", "18")])
    assert isinstance(endless, NoReward)
    assert "1.0 s of CPU time" in endless.reason
    assert right == 1.0
    reward.close()


def test_threads_share_one_reward_and_the_main_thread_keeps_its_alarm(reward: MathReward) -> None:
    def handler(signum: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGALRM, handler)
    remaining = signal.setitimer(signal.ITIMER_REAL, 100)
    verdicts: dict[int, float] = {}

    def work(number: int) -> None:
        verdicts[number] = reward([sample(f"\\boxed{{\\frac{{{2 * number}}}{{2}}}}", str(number))])[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, *remaining)
        signal.signal(signal.SIGALRM, before)
    assert verdicts == dict.fromkeys(range(1, 9), 1.0)


def test_a_child_that_died_is_replaced() -> None:
    reward = MathReward()
    half = sample(r"\boxed{0.5}", "1/2")
    assert reward([half]) == [1.0]
    child = reward._verifier._child
    assert child is not None
    child.kill()
    child.wait()
    assert reward([half]) == [1.0]
    reward.close()
    assert child.poll() is not None


def test_closing_leaves_no_process() -> None:
    reward = MathReward()
    reward([sample(r"\boxed{0.5}", "1/2")])
    child = reward._verifier._child
    assert child is not None
    del reward  # also without close()
    assert child.wait(10) is not None


def test_absent_math_verify_is_an_error_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    source = verifier_module.PROGRAM.read_text()
    program.write_text(source.replace("import math_verify", "import math_verify_that_is_not_there"))
    monkeypatch.setattr(verifier_module, "PROGRAM", program)
    with pytest.raises(RewardError, match="pip install math-verify"):
        MathReward()([sample(r"\boxed{0.5}", "1/2")])


def test_a_prompt_without_answer_is_an_error(reward: MathReward) -> None:
    with pytest.raises(RewardError, match=r"set data\.answer"):
        reward([sample("5", None)])
