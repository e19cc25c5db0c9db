"""The GRPO task of `bench_train.py`, the same for everyone who runs it; standard library only.

A 260,032-parameter Llama that was pretrained on children's stories is to name the hero at least twice. A program that
takes part reads one line from standard input before each step, and writes one JSON line after it (`report`).
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from pathlib import Path

NAMES = ("Tom", "Lily", "Ben", "Sam", "Max", "Sue", "Amy", "Tim")
PROMPTS = [(f"Once upon a time, there was a little {kind} named {n}.", n) for n in NAMES for kind in ("boy", "girl")]
SAMPLES, MAX_TOKENS = 8, 48  # of each prompt; new tokens of each sample
LEARNING_RATE, BETAS, CLIP_GRADIENT, KL = 1e-4, (0.9, 0.99), 1.0, 0.02
MARK = "BENCH-STEP "


def reward(text: str, name: str) -> float:
    """1 when the story names its hero twice or more."""
    return float(len(re.findall(rf"\b{name}\b", text)) >= 2)


def find_model() -> Path:
    """The Hugging Face folder; ends the program with a message where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MEGATRON_RL_TEST_DATA") or beside) / "models" / "stories260k-hf"
    if not (folder / "config.json").is_file():
        sys.exit(f"no model in {folder}: set MEGATRON_RL_TEST_DATA to a folder with models/stories260k-hf")
    return folder


def wait_for_turn() -> bool:
    """Block until the next step may start; False when there is none."""
    return bool(sys.stdin.readline())


def report(record: dict[str, object]) -> None:
    """Hand a step's figures to the program that started this one."""
    print(MARK + json.dumps(record), flush=True)


def peak_rss_mb() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
