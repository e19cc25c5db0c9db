"""Runs each one-call trainer on a tiny random model, one process, and prints first and last metrics as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl import DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer, SFTTrainer
from megatron_rl.environments import Environment, Step
from megatron_rl.tracking import TrackerGroup, read_metrics

QUIET = TrackerGroup.Config(trackers=("jsonl",))


def pairs() -> list[dict[str, object]]:
    sums = [(a, b) for a in range(10, 22) for b in range(10, 14)]
    return [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 7)} for a, b in sums]


def labelled() -> list[dict[str, object]]:
    rows = [(p["prompt"], p[key], key == "chosen") for p in pairs() for key in ("chosen", "rejected")]
    return [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in rows]


def digits(sample) -> float:
    return sum(c in "02468" for c in sample.response_text) / 5


def always_one(sample) -> float:
    return 1.0


class AskedTwice(Environment):
    """Wants even digits, twice."""

    turns = 0

    def step(self, message) -> Step:
        self.turns += 1
        return Step("7+7=", sum(c in "02468" for c in message["content"]) / 10, self.turns == 2)


def outcome(trainer, folder: Path, steps: int, rate: float) -> dict[str, object]:
    trainer.train(1, 16, rate, str(folder), max_steps=steps, tracking=QUIET)
    found = read_metrics(folder / "metrics.jsonl")
    return {"first": found[1], "last": found[max(found)], "exported": int((folder / "hf" / "config.json").exists())}


def error_of(make) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    model, tokenizer = str(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    common = (model, tokenizer)
    sampled = {"n": 4, "max_tokens": 5, "reward": digits}
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    chat = AutoTokenizer.from_pretrained(folder / "model")
    chat.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    short = (model, chat, pairs())
    turns = {"n": 4, "max_tokens": 5, "environment": AskedTwice}
    limited = turns | {"environment": {"name": f"python:{__file__}:AskedTwice", "max_turns": 1}}
    held_out = pairs()[:8]
    results: dict[str, object] = {
        "dpo": outcome(DPOTrainer(*common, pairs(), beta=0.5, max_length=32), folder / "dpo", 12, 3e-3),
        "sft": outcome(SFTTrainer(*common, sft, max_length=32), folder / "sft", 12, 3e-3),
        "kto": outcome(KTOTrainer(*common, labelled(), beta=0.5), folder / "kto", 12, 3e-3),
        "grpo": outcome(GRPOTrainer(*common, pairs(), **sampled), folder / "grpo", 12, 1e-2),
        "ppo": outcome(PPOTrainer(*common, pairs(), **sampled), folder / "ppo", 12, 1e-2),
        "ppo_shared": outcome(PPOTrainer(*common, pairs(), shared_critic=True, **sampled), folder / "shared", 12, 1e-2),
        "grpo_episodes": outcome(GRPOTrainer(*short, eval_dataset=held_out, **turns), folder / "episodes", 12, 1e-2),
        "ppo_episodes": outcome(PPOTrainer(*short, reward=always_one, **limited), folder / "both", 1, 1e-2),
        "errors": {
            "no_reward": error_of(lambda: GRPOTrainer(*common, pairs())),
            "no_template": error_of(lambda: PPOTrainer(*common, pairs(), max_tokens=5, environment=AskedTwice)),
            "instance": error_of(lambda: GRPOTrainer(*short, max_tokens=5, environment=AskedTwice())),
            "other": error_of(lambda: GRPOTrainer(*short, max_tokens=5, environment=lambda: 3)),
            "key": error_of(lambda: GRPOTrainer(*short, max_tokens=5, environment={"name": "tools", "max_turn": 2})),
            "option": error_of(lambda: DPOTrainer(*common, pairs(), betta=0.1)),
            "precomputed": error_of(lambda: DPOTrainer(*common, pairs(), precomputed_reference=True)),
            "kto_batch": error_of(lambda: KTOTrainer(*common, labelled()).train(1, 1, 1e-3, str(folder / "none"))),
            "kto_eval": error_of(
                lambda: KTOTrainer(*common, labelled(), eval_dataset=labelled()[:1], allow_one_class=True).train(1, 2)
            ),
            "columns": error_of(lambda: DPOTrainer(*common, [{"prompt": "1+1=", "good": "2"}])),
        },
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
