"""What overlapping sampling with training is worth: one JSON object on the last line.

Each case runs the same task under each law: lag 0 (the halves take turns), lag 1 (law *batch*), and the windowed law at
lag 1, whose groups stay in flight over steps. Keys of a case:
``step_s`` seconds a step, ``bound_s`` what an ideal schedule of the same halves takes, ``ratio_to_bound``, and
``wait_share`` of training and of the engine; ``lag1_to_lag0`` and ``windowed_to_lag0`` compare the laws. The bound of
the windowed law is the slower half alone: training, or the answers with every slot busy all the time.

``long_tail``: an engine with published heavy-tailed latencies and a training step of a published time (`long_tail.py`),
so that the bound is computed from what was published. ``forecast_s`` is what ``megatron-rl plan --lag`` says beforehand
and ``forecast_error`` how far off it was. ``sglang`` (with --sglang PYTHON): a real CPU server on one core and
training on the other, which goes over each batch six times so that the halves are about equal. Its bound is computed
from the means of lag 0 (``halves_s``), pushes included: the server answers nothing while it takes weights.

    python tools/bench_async.py [--steps 16] [--sglang .venv-sglang/bin/python]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from long_tail import CALLS, ENDS, SLOTS, TRAIN_S, ideal, latency

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "examples" / "arithmetic_grpo"
PROMPTS = 8  # of a step
LAWS = {"lag0": (0, "batch"), "lag1": (1, "batch"), "windowed": (1, "windowed")}


def write_task(folder: Path, steps: int, sglang: str | None) -> Path:
    """Model, tokenizer, prompts and the configuration that both laws run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_rl.config import load_user_object

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ARITHMETIC / "model_sglang")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    load_user_object(f"{ARITHMETIC}/arithmetic.py:build_tokenizer")().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 60) for b in range(10, 30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rollout: dict[str, Any] = {"engine": "long_tail"}
    if sglang:
        server = {"python": sglang, "log_dir": str(folder / "servers"), "max_total_tokens": 8192}
        rollout = {"engine": "sglang", "dtype": "bfloat16", "max_running": 128, "options": {"server": server}}
    values = {
        "model": str(folder / "model"),
        "algorithm": {"name": "grpo", "num_epochs": 6} if sglang else {"name": "paced_grpo"},
        "parallel": {"rollout_ranks": 1},
        "actor": {"sampling": {"n": 8 if sglang else 2, "max_tokens": 48 if sglang else 4}, "rollout": rollout},
        "data": {"path": str(folder / "train.jsonl")},
        "prompts_per_step": 16 if sglang else 8,
        "rewards": [{"name": f"python:{ARITHMETIC}/arithmetic.py:score"}],
        "callbacks": ["long_tail:Pace" if not sglang else "long_tail:Clock"],
        "trainer": {"num_steps": steps, "save_at_end": False, "export": False, "evaluate_at_start": False},
        "tracking": {"trackers": ["jsonl"]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def work(config_path: str, output: str, *overrides: str) -> None:
    """One rank of one run: training on one core, the rollout rank and its server on the other."""
    from megatron_rl.config import load_config
    from megatron_rl.run.build import build_trainer
    from megatron_rl.run.run_config import RunConfig

    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    build_trainer(load_config(RunConfig, Path(config_path), list(overrides))).train()
    Path(f"{output}.{rank}").write_text(json.dumps({"calls": CALLS, "ends": ENDS}))
    torch.distributed.destroy_process_group()


def run(
    config: Path, folder: Path, law: str, timeout: float
) -> tuple[list[float], list[float], list[dict[str, float]]]:
    """Times of generation, ends of steps, and the metrics of each step."""
    from megatron_rl.tracking import read_metrics

    out, times = folder / law, folder / f"{law}.times"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    lag, name = LAWS[law]
    command += ["--worker", str(config), str(times), f"trainer.output_dir={out}", f"rollout_lag={lag}"]
    command += [f"rollout_law={name}"]
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, env=environment, check=True, timeout=timeout, stdout=sys.stderr)
    training, rollout = (json.loads(Path(f"{times}.{rank}").read_text()) for rank in (0, 1))
    metrics = [values for step, values in sorted(read_metrics(out / "metrics.jsonl").items()) if step]
    return rollout["calls"], training["ends"], metrics


def mean(metrics: list[dict[str, float]], *names: str) -> float:
    """Of the sum of some metrics over the steps that ``step_s`` counts: without the first, with its cold caches."""
    return statistics.mean(sum(values[name] for name in names) for values in metrics[1:])


def forecast() -> dict[str, float]:
    """Seconds of a step of `long_tail`, from the distribution of its latencies alone."""
    from megatron_rl.run.lag_forecast import Timing, forecast_lag

    lengths = tuple(latency(seed) for seed in range(5000))
    timing = Timing(
        prompts_per_step=PROMPTS, samples_per_prompt=1, slots=SLOTS, token_s=1.0, lengths=lengths, training_s=TRAIN_S,
        push_s=0.0, num_steps=400,
    )  # fmt: skip
    in_turns, batch, windowed = forecast_lag(timing, lag=1).laws
    return {"lag0": in_turns.step_s, "lag1": batch.step_s, "windowed": windowed.step_s}


def full_slots() -> float:
    """Seconds of the mean batch of `long_tail` whose slots are never empty."""
    return PROMPTS * statistics.mean(latency(seed) for seed in range(5000)) / SLOTS


def measured_parts(metrics: list[dict[str, float]], steps: int) -> tuple[list[float], float, float]:
    """Seconds of each batch, of training on one and of a push, as the steps of lag 0 say."""
    generation = mean(metrics, "time/actor.sample_s", "time/reward.score_s")
    trained = mean(metrics, "time/step_s") - mean(metrics, "time/actor.receive_s")
    return [generation] * steps, trained, mean(metrics, "time/weight_sync_s")


def measure(steps: int, sglang: str | None) -> dict[str, Any]:
    """One case."""
    found: dict[str, Any] = {"step_s": {}, "bound_s": {}, "ratio_to_bound": {}, "wait_share": {}}
    parts: tuple[list[float], float, float] | None = None
    with tempfile.TemporaryDirectory(prefix="bench_async-") as name:
        config = write_task(Path(name), steps, sglang)
        for law, (lag, _) in LAWS.items():
            calls, ends, metrics = run(config, Path(name), law, timeout=1200)
            if parts is None:
                parts = measured_parts(metrics, steps) if sglang else (calls, TRAIN_S, 0.0)
            generation, trained, push = parts
            best = ideal(generation, trained, lag, push)
            step_s, bound_s = ((times[-1] - times[0]) / (steps - 1) for times in (ends, best))
            if law == "windowed":
                bound_s = max(trained, statistics.mean(generation) if sglang else full_slots()) + push
            found["step_s"][law], found["bound_s"][law] = round(step_s, 4), round(bound_s, 4)
            found["ratio_to_bound"][law] = round(step_s / bound_s, 4)
            shares = {half: mean(metrics, f"time/{half}_wait_share") for half in ("training", "engine")}
            found["wait_share"][law] = {half: round(share, 3) for half, share in shares.items()}
    assert parts is not None
    if not sglang:
        found["forecast_s"] = {law: round(seconds, 4) for law, seconds in forecast().items()}
        errors = {law: seconds / found["step_s"][law] - 1 for law, seconds in found["forecast_s"].items()}
        found["forecast_error"] = {law: round(error, 4) for law, error in errors.items()}
    means = {"generation": statistics.mean(parts[0]), "training": parts[1], "push": parts[2]}
    found["halves_s"] = {name: round(seconds, 4) for name, seconds in means.items()}
    for law in ("lag1", "windowed"):
        found[f"{law}_to_lag0"] = round(found["step_s"][law] / found["step_s"]["lag0"], 4)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--sglang", help="Python of an environment with SGLang")
    given = parser.parse_args()
    result = {"benchmark": "async", "steps": given.steps, "long_tail": measure(given.steps, None)}
    if given.sglang:
        result["sglang"] = measure(given.steps, given.sglang)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
