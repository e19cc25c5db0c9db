"""What a run leaves for people beside its metrics: the reward curve as a picture."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.tracking import Tracker, plot_reward_curve, read_metrics
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.loop import Trainer


class RewardCurve(Callback):
    """Draws ``reward_curve.png`` from ``metrics.jsonl`` when the run ends."""

    def __init__(self, output_dir: Path, tracker: Tracker) -> None:
        self.output_dir = output_dir
        self.tracker = tracker

    def on_train_end(self, trainer: Trainer) -> None:
        source = self.output_dir / "metrics.jsonl"
        if trainer.context.rank != 0 or not source.exists():
            return
        picture = self.output_dir / "reward_curve.png"
        metrics = read_metrics(source)
        if any("rewards/mean" in values for values in metrics.values()):
            plot_reward_curve(metrics, picture, train="rewards/mean")
            self.tracker.log_artifact(picture)
