"""`TrackerGroup`: several trackers as one, and `build_tracker`, which makes them from configuration.

Every rank checks the configuration, so that a mistake stops all of them; only rank 0 builds real trackers, every
other rank gets an empty group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.tracking.delivery import Delivery
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker, flatten


class TrackerGroup(Tracker):
    """Sends everything to each of its trackers, in order."""

    class Config(ConfigRecord):
        """The ``tracking`` section of a run's configuration."""

        trackers: tuple[str, ...] = ("console", "jsonl")
        """Names of the trackers to use: console, jsonl, mlflow, tensorboard, wandb."""
        experiment: str = "megatron_rl"
        """Experiment (MLflow) or project (W&B) that groups runs."""
        run_name: str = ""
        """Name of this run; empty means the name of the output folder."""
        options: dict[str, dict[str, Any]] = {}  # noqa: RUF012  (pydantic copies defaults)
        """Options of single trackers by name, for example {mlflow: {uri: "http://tracking:5000"}}."""

    def __init__(self, run: TrackedRun, trackers: Sequence[Tracker] = ()) -> None:
        super().__init__(run)
        self.trackers = list(trackers)

    def start(self, resume_step: int | None = None) -> None:
        for tracker in self.trackers:
            tracker.start(resume_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        flat = flatten(params)
        for tracker in self.trackers:
            tracker.log_params(flat)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path, folder)

    def close(self, status: str = "finished") -> None:
        """Closes every tracker, in reverse order, once."""
        while self.trackers:
            self.trackers.pop().close(status)


def build_tracker(
    config: TrackerGroup.Config, output_dir: Path, rank: int = 0, total_steps: int | None = None
) -> TrackerGroup:
    """The trackers that ``config`` asks for, on rank 0; an empty group elsewhere.

    Raises:
        ConfigError: on every rank: an unknown tracker or option, or a package that is not installed.
    """
    run = TrackedRun(
        output_dir=Path(output_dir).absolute(),
        experiment=config.experiment,
        name=config.run_name or Path(output_dir).absolute().name,
        total_steps=total_steps,
    )
    if unused := sorted(set(config.options) - set(config.trackers)):
        raise ConfigError(f"tracking.options has {unused[0]!r}, which is not in tracking.trackers: {config.trackers}")
    chosen = [_choose(name, config.options.get(name, {})) for name in dict.fromkeys(config.trackers)]
    if rank != 0:
        return TrackerGroup(run)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(config.trackers)
    return TrackerGroup(
        run, [Delivery(kind(run, options), name) for name, (kind, options) in zip(names, chosen, strict=True)]
    )


def _choose(name: str, options: Mapping[str, Any]) -> tuple[type[Tracker], ConfigRecord]:
    try:
        kind = TRACKERS[name]
    except ValueError as error:
        raise ConfigError(f"tracking.trackers: {error}") from None
    kind.check_installed(name)
    return kind, kind.Config.parse(options, where=f"tracking.options.{name}")
