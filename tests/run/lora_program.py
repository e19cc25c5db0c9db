"""Test program on two ranks: DPO with adapters on a real model over two layouts, resumed, and converted.

Prints JSON on rank 0. Usage: lora_program.py MODEL FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl import DPOTrainer
from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.tracking import TrackerGroup
from megatron_rl.workers import Actor

STEPS = 12
LAYOUTS = {"tp2": ParallelSizes(tp=2, sequence_parallel=True), "dp2": ParallelSizes(), "pp2": ParallelSizes(pp=2)}


def pairs(names: str) -> list[dict[str, object]]:
    """Stories that end well or badly, in several wordings."""
    ends = [
        (" was very happy and smiled.", " was very sad and cried."),
        (" had a lot of fun and laughed.", " got hurt and was scared."),
    ]
    first = "Once upon a time, {} went to the park."
    return [
        {"prompt": first.format(name), "chosen": f" {name}{good}", "rejected": f" {name}{bad}"}
        for name in names.split()
        for good, bad in ends
    ]


def train(model: str, out: Path, sizes: ParallelSizes, resume: str = "auto", **options: object) -> dict[str, float]:
    trainer = DPOTrainer(
        model, AutoTokenizer.from_pretrained(model), pairs("Tom Lily Ben Sue Tim Anna Max Mia"), beta=0.3,
        max_length=128, eval_dataset=pairs("Sam Lucy Jack Amy"), parallel=sizes, lora={"rank": 4, "alpha": 8.0},
        **options,
    )  # fmt: skip
    quiet = TrackerGroup.Config(trackers=("jsonl",))
    size = 4 if ParallelContext.create(sizes).dp_size == 2 else 8
    ParallelContext.forget()
    found = trainer.train(
        1, size, 3e-3, str(out), max_steps=STEPS, save_every=STEPS // 2, evaluate_every=STEPS, resume=resume,
        tracking=quiet,
    )  # fmt: skip
    ParallelContext.forget()
    return {name: value for name, value in found.items() if not name.startswith("time/")}


def difference(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def refused(model: str, checkpoint: Path) -> str:
    try:
        Actor(str(checkpoint), AutoTokenizer.from_pretrained(model), parallel=ParallelSizes(tp=2))
    except ConfigError as error:
        return str(error)
    finally:
        ParallelContext.forget()
    return ""


def main(model: str, folder: Path) -> None:
    results: dict[str, object] = {name: train(model, folder / name, sizes) for name, sizes in LAYOUTS.items()}
    middle = folder / "tp2" / "checkpoints" / f"step_{STEPS // 2:06d}"
    for name in ("tp2", "pp2"):
        results[f"resumed {name}"] = train(model, folder / f"resumed {name}", LAYOUTS[name], str(middle))
    results["cached"] = train(model, folder / "cached", LAYOUTS["tp2"], reference_cache=folder / "cache")
    results["refused"] = refused(model, middle)
    if torch.distributed.get_rank() == 0:
        for name in ("resumed tp2", "resumed pp2", "dp2"):
            results[f"difference {name}"] = difference(folder / "tp2" / "hf", folder / name / "hf")
        results["difference from base"] = difference(folder / "tp2" / "hf", Path(model))
        print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
