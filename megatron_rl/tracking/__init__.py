"""Where metrics go: console, metrics.jsonl, MLflow, TensorBoard, W&B, and a reward-curve picture."""

from megatron_rl.tracking import console, jsonl, mlflow, tensorboard, wandb  # noqa: F401  (each files itself in TRACKERS)
from megatron_rl.tracking.group import TrackerGroup, build_tracker
from megatron_rl.tracking.jsonl import read_metrics
from megatron_rl.tracking.plot import plot_reward_curve
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

__all__ = [
    "TRACKERS",
    "TrackedRun",
    "Tracker",
    "TrackerGroup",
    "build_tracker",
    "plot_reward_curve",
    "read_metrics",
]
