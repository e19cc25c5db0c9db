"""The arithmetic example: its tokenizer and split, and the pretraining job saved in one layout and loaded in others."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_ranks
from torchrun import ROOT
from transformers import AutoTokenizer

spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "examples" / "arithmetic_grpo" / "arithmetic.py")
arithmetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arithmetic)


def test_tokenizer_gives_one_token_a_character_and_survives_saving(tmp_path: Path) -> None:
    arithmetic.build_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (arithmetic.build_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("12+34=46<eos>").input_ids
        assert ids == [5, 6, 14, 7, 8, 15, 8, 10, 2]
        assert tokenizer.decode(ids) == "12+34=46<eos>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "12+34=46"
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer("1x").input_ids == [5, 3]
        assert len(tokenizer) == len(arithmetic.VOCABULARY) == 16


def test_held_out_sums_are_trained_on_in_neither_order() -> None:
    training, held_out = arithmetic.split_sums()
    assert len(set(held_out)) == len(held_out) == 500
    assert len(training) == 90 * 90 - 500
    assert not set(training) & {*held_out, *((b, a) for a, b in held_out)}
    assert arithmetic.split_sums() == (training, held_out)


def test_files_hold_prompts_with_their_answers(tmp_path: Path) -> None:
    arithmetic.write_files(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert [(record["prompt"], record["answer"]) for record in records] == [
        (f"{a}+{b}=", str(a + b)) for a, b in arithmetic.split_sums()[1]
    ]


@pytest.mark.parametrize(("response", "reward"), [("46", 1.0), ("47", 0.0), ("460", 0.0), ("", 0.0)])
def test_reward_is_one_for_the_exact_number_only(response: str, reward: float) -> None:
    sample = SimpleNamespace(response_text=response, prompt=SimpleNamespace(answer="46"))
    assert arithmetic.score(sample) == reward


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses before and after pretraining on TP2 PP2, and of models before and after they load the checkpoint."""
    program = Path(__file__).with_name("pretrain_program.py")
    out = run_ranks(program, 4, tmp_path_factory.mktemp("pretrained") / "checkpoint", timeout=240)
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.distributed
def test_pretraining_lowers_the_loss(pretrained: dict[str, Any]) -> None:
    assert pretrained["after"] < pretrained["before"] - 0.3


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp1pp1", "tp2pp1", "tp1pp2"])
def test_a_pretrained_checkpoint_loads_in_another_layout(pretrained: dict[str, Any], layout: str) -> None:
    unloaded, loaded = pretrained[layout]
    assert abs(unloaded / pretrained["after"] - 1) > 1e-3, "it had these weights before loading"
    assert abs(loaded / pretrained["after"] - 1) < 1e-5
