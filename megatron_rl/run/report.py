"""Plots of a run: the reward curve and the training curve, which are one where samples have rewards."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rl.tracking import Tracker, plot_reward_curve, read_metrics
from megatron_rl.trainer.callbacks import Callback, TrainerView

WATCHED = ("rewards/mean", "rewards/accuracies", "loss/total")  # the first of these that a run has is drawn


class RewardCurve(Callback):
    """Draws ``training_curve.png``, and ``reward_curve.png`` where samples have rewards, when the run ends; from
    ``metrics.jsonl``."""

    def __init__(self, output_dir: Path, tracker: Tracker) -> None:
        self.output_dir = output_dir
        self.tracker = tracker

    def on_train_end(self, trainer: TrainerView) -> None:
        source = self.output_dir / "metrics.jsonl"
        if trainer.context.rank != 0 or not source.exists():
            return
        metrics = read_metrics(source)
        names = {name for values in metrics.values() for name in values}
        watched = next((name for name in WATCHED if name in names), None)
        if watched is None:
            return
        picture = self.output_dir / "training_curve.png"
        if watched == "rewards/mean":
            plot_reward_curve(metrics, picture, train=watched)
            reward_curve = shutil.copyfile(picture, self.output_dir / "reward_curve.png")
            self.tracker.log_artifact(reward_curve)
        else:
            plot_reward_curve(metrics, picture, watched, f"eval/{watched}", title="Training", ylabel=watched)
        self.tracker.log_artifact(picture)
