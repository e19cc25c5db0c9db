"""Runs GRPO and PPO with and without evaluation, one process, and prints what was tracked, by run and step, as JSON.

Usage: evaluation_program.py FOLDER, of `small_run.write_run`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from small_run import digits, metrics_of
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl import GRPOTrainer, PPOTrainer
from megatron_rl.config import load_config
from megatron_rl.run.build import build_trainer
from megatron_rl.run.run_config import RunConfig
from megatron_rl.tracking import TrackerGroup

STEPS, EVERY = 6, 2
Tracked = dict[int, dict[str, float]]


def prompts(start: int, stop: int) -> list[dict[str, str]]:
    return [{"prompt": f"{a}+{b}="} for a in range(start, stop) for b in range(10, 14)]


def train(folder: Path, kind: type[GRPOTrainer], evaluated: bool, rate: float) -> Tracked:
    """One call of a trainer; the held-out prompts have other first terms."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    held_out = {"eval_dataset": prompts(30, 34)} if evaluated else {}
    trainer = kind(
        str(folder / "model"), tokenizer, prompts(10, 22), reward=digits, n=4, max_tokens=5, kl_coefficient=0.01,
        **held_out,
    )  # fmt: skip
    output = folder / f"{kind.__name__}_{evaluated}_{rate}"
    every = EVERY if evaluated else 0
    trainer.train(
        1,
        8,
        rate,
        str(output),
        max_steps=STEPS,
        evaluate_every=every,
        tracking=TrackerGroup.Config(trackers=("jsonl",)),
    )
    return metrics_of(output)


def from_yaml(folder: Path, *overrides: str) -> Tracked:
    output = folder / f"yaml_{len(list(folder.glob('yaml_*')))}"
    run = load_config(RunConfig, folder / "config.yaml", [*overrides, f"trainer.output_dir={output}"])
    build_trainer(run).train()
    return metrics_of(output)


def main(folder: Path) -> None:
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, prompts(30, 34))))
    evaluation = [
        f"evaluation={{n: 2, temperature: 1.0, data: {{path: {folder / 'held_out.jsonl'}}}}}",
        f"trainer.evaluate_every={EVERY}",
    ]
    still = "actor.optimizer.learning_rate=0.0"
    results = {
        "GRPOTrainer": train(folder, GRPOTrainer, True, 1e-2),
        "GRPOTrainer alone": train(folder, GRPOTrainer, False, 1e-2),
        "GRPOTrainer still": train(folder, GRPOTrainer, True, 0.0),
        "PPOTrainer": train(folder, PPOTrainer, True, 1e-2),
        "PPOTrainer alone": train(folder, PPOTrainer, False, 1e-2),
        "PPOTrainer still": train(folder, PPOTrainer, True, 0.0),
        "yaml": from_yaml(folder, *evaluation, "actor.optimizer.learning_rate=1e-2"),
        "yaml alone": from_yaml(folder, "actor.optimizer.learning_rate=1e-2"),
        "yaml still": from_yaml(folder, *evaluation, still),
    }
    left = folder / "yaml_0" / "checkpoints" / f"step_{STEPS:06d}"
    results["from the checkpoint"] = from_yaml(folder, *evaluation, still, f"model={left}", "trainer.num_steps=1")
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
