"""How fast a DPO step is, by megatron_rl and by TRL: one JSON object on the last line.

The same task for both (`pairs_task.py`): real preference pairs, a Llama of five million parameters with the same random
weights, the same eight pairs in each step, a frozen reference that is run in each step, fp32, one thread, on this CPU.
The two are started once and take turns, step by step; the first steps are not counted. ``tokens_ratio_vs_trl`` is
non-padding tokens a second, ours over TRL's (more is better); ``memory_ratio_vs_trl`` the peak resident memory of the
whole process, ours over TRL's (less is better), and ``memory_of_training_ratio_vs_trl`` the same without what was
resident before the first step.

    make bench-dpo               # with TRL in ./.venv-trl
    python tools/bench_dpo.py [--trl PYTHON_WITH_TRL] [--steps 12] [--trl-micro-batch PAIRS]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_train import TOOLS, Participant, measure, processor
from pairs_task import BATCH, SHAPE, find_pairs, write_model


def figures(participant: Participant) -> dict[str, Any]:
    """Medians over the counted steps; a step's own speed first, because steps differ in length."""
    steps = participant.counted
    return {
        "tokens_per_s": round(statistics.median(s["tokens"] / s["seconds"]["total"] for s in steps), 1),
        "tokens_per_cpu_s": round(statistics.median(s["tokens"] / s["seconds"]["cpu"] for s in steps), 1),
        "step_s": round(statistics.median(s["seconds"]["total"] for s in steps), 3),
        "tokens_per_step": round(statistics.mean(s["tokens"] for s in steps), 1),
        "peak_rss_mb": round(max(s["peak_rss_mb"] for s in participant.steps), 1),
        "training_rss_mb": round(max(s["peak_rss_mb"] for s in participant.steps) - steps[0]["start_rss_mb"], 1),
    }


def compare(ours: Participant, trl: Participant) -> dict[str, float]:
    """Ratios step by step: both have seen the same pairs at the same time on the same machine."""
    pairs = list(zip(ours.counted, trl.counted, strict=True))
    mine, theirs = figures(ours), figures(trl)

    def speed(clock: str) -> float:
        return statistics.median(
            (a["tokens"] / a["seconds"][clock]) / (b["tokens"] / b["seconds"][clock]) for a, b in pairs
        )

    return {
        "tokens_ratio_vs_trl": round(speed("total"), 3),
        "tokens_ratio_vs_trl_cpu": round(speed("cpu"), 3),
        "memory_ratio_vs_trl": round(mine["peak_rss_mb"] / theirs["peak_rss_mb"], 3),
        "memory_of_training_ratio_vs_trl": round(mine["training_rss_mb"] / theirs["training_rss_mb"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="the python of an environment with TRL; without it only ours is run")
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each")
    parser.add_argument("--trl-micro-batch", type=int, default=BATCH, help="pairs that TRL takes in one pass")
    options = parser.parse_args()
    find_pairs()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_model(Path(folder)))
        ours = Participant("megatron_rl", [sys.executable, str(TOOLS / "pairs_ours.py"), model])
        trl = []
        if options.trl:
            command = [str(options.trl), str(TOOLS / "pairs_trl.py"), model, str(options.trl_micro_batch)]
            trl = [Participant("TRL", command)]
        measure([ours, *trl], options.steps)
    result: dict[str, Any] = {"ours": figures(ours)}
    if trl:
        result = compare(ours, trl[0]) | result | {"trl": figures(trl[0])}
    result["measured"] = {
        "task": f"DPO, HH pairs, {BATCH} a step, Llama {SHAPE['num_hidden_layers']} x {SHAPE['hidden_size']}, fp32",
        "device": f"cpu: {processor()}",
        "cores": os.cpu_count(),
        "threads_per_process": 1,
        "steps": options.steps,
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
