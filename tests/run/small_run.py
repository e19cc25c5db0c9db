"""A complete small training run for tests: a random Llama, arithmetic prompts, and the YAML that trains it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rl.batch import Batch
from megatron_rl.config import load_user_object
from megatron_rl.tracking import read_metrics
from megatron_rl.trainer import Callback, TrainingLoop

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic_grpo" / "arithmetic.py"


def write_run(folder: Path, **sections: object) -> Path:
    """Write model, tokenizer, data and config.yaml below ``folder``; returns the YAML's path.

    ``sections`` replace top-level keys of the configuration.
    """
    build_tokenizer = load_user_object(f"{ARITHMETIC}:build_tokenizer")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 20) for b in range(10, 14)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values: dict[str, object] = {
        "model": str(folder / "model"),
        "algorithm": {"name": "grpo", "num_mini_batches": 2, "kl_coefficient": 0.01},
        "reference": {},
        "actor": {
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "decay": "cosine"},
            "sampling": {"n": 4, "max_tokens": 5},
        },
        "data": {"path": str(folder / "train.jsonl")},
        "prompts_per_step": 8,
        "rewards": [{"name": f"python:{__file__}:digits"}],
        "trainer": {"output_dir": str(folder / "out"), "num_steps": 6, "save_every": 2, "export": False},
        "tracking": {"trackers": ["jsonl"]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def digits(sample) -> float:
    """Share of even digits: dense enough that a random model's advantages are never all zero."""
    return sum(c in "02468" for c in sample.response_text) / 5


def metrics_of(output_dir: Path) -> dict[int, dict[str, float]]:
    """Everything tracked but times, by step."""
    found = read_metrics(output_dir / "metrics.jsonl")
    return {s: {k: v for k, v in m.items() if not k.startswith("time/")} for s, m in found.items()}


class KillOnce(Callback):
    """Kills one rank in the middle of a step, the first time round; $KILL_MARK, $KILL_RANK and $KILL_STEP say which."""

    def on_step_begin(self, trainer: TrainingLoop, batch: Batch) -> None:
        mark = Path(os.environ["KILL_MARK"])
        here = trainer.context.rank == int(os.environ["KILL_RANK"]) and trainer.step == int(os.environ["KILL_STEP"])
        if here and not mark.exists():
            mark.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)


def many_even_digits(sample) -> float:
    """0 or 1: many groups have equal rewards."""
    return float(digits(sample) > 0.5)
