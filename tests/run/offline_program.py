"""Test program on two ranks: DPO and KTO with evaluation, with and without a reference cache, TP2 and DP2.

Prints JSON on rank 0: for each run its last metrics, and how many files the cache then holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl import DPOTrainer, KTOTrainer
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.tracking import TrackerGroup


def pairs(first: int, last: int) -> list[dict[str, object]]:
    sums = [(a, b) for a in range(first, last) for b in range(10, 14)]
    return [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 7)} for a, b in sums]


def run(kind: type, folder: Path, name: str, sizes: ParallelSizes, cache: Path | None) -> dict[str, float]:
    # Of little weight, or the policy unlearns all numbers, and the KL's estimate is below 0, which counts as 0.
    options = {"undesirable_weight": 0.1} if kind is KTOTrainer else {}
    trainer = kind(
        str(folder / "model"), AutoTokenizer.from_pretrained(folder / "model"), pairs(10, 16), beta=0.5, max_length=32,
        eval_dataset=pairs(20, 23)[:-1], reference_cache=cache, parallel=sizes, **options,
    )  # fmt: skip
    size = 8 if sizes.tp == 2 else 4
    quiet = TrackerGroup.Config(trackers=())
    found = trainer.train(1, size, 3e-3, str(folder / name), max_steps=6, evaluate_every=3, tracking=quiet)
    ParallelContext.forget()
    return {name: value for name, value in found.items() if not name.startswith("time/")}


def main(folder: Path) -> None:
    cache = folder / "cache"
    results: dict[str, object] = {}
    for layout, sizes in {"tp2": ParallelSizes(tp=2), "dp2": ParallelSizes()}.items():
        for kind in (DPOTrainer, KTOTrainer):
            for how in ("model", "cache"):
                name = f"{kind.__name__} {layout} {how}"
                results[name] = run(kind, folder, name, sizes, cache if how == "cache" else None)
                results[f"{name} files"] = len(list(cache.glob("*.pt")))
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
