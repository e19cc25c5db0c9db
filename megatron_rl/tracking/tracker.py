"""`Tracker`: the interface of one destination of metrics, and `TrackedRun`: what every tracker knows about the run.

A new tracker is one class in a file beside the others and one registry line. Its constructor does the slow and
fallible work (imports, connections), so it is built on rank 0 only; see `build_tracker`. `start` comes once, when it is
known whether a checkpoint was loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.registry import Registry


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that is being tracked."""

    output_dir: Path  # every file of the run lies below it
    experiment: str = "megatron_rl"  # groups runs
    name: str = "run"  # this run among those of its experiment
    total_steps: int | None = None  # for progress bars; None when unknown


class Tracker:
    """One destination of metrics. Every method may be a no-op.

    Metric names are ``area/name`` ("loss/policy", "time/step_s"); steps count optimizer steps of the run and survive
    resuming.
    """

    class Config(ConfigRecord):
        """Options of this tracker, ``tracking.options.<name>`` in YAML."""

    remote: ClassVar[bool] = False  # over a network: called by a thread, which retries during outages; see `Delivery`
    package: ClassVar[str] = ""  # the third-party module it needs, and the name of our extra that installs it

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        self.run = run
        self.config = config or self.Config()

    @classmethod
    def check_installed(cls, name: str) -> None:
        """Cheap check, made on every rank so that all of them fail together.

        Raises:
            ConfigError: the package behind this tracker is not installed.
        """
        if cls.package and importlib.util.find_spec(cls.package) is None:
            raise ConfigError(
                f"tracker {name!r} needs the package {cls.package}, which is not installed: run "
                f"pip install 'megatron-rl[{cls.package}]', or leave {name!r} out of tracking.trackers"
            )

    def is_outage(self, error: Exception) -> bool:
        """Whether an error of a ``remote`` tracker is transient, so that another try may succeed."""
        return isinstance(error, OSError)

    def start(self, resume_step: int | None = None) -> None:
        """Begin the run, or continue it after ``resume_step``, the last step that the loaded checkpoint holds; what an
        interrupted run recorded later is dropped where the destination can forget."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step. Several calls for one step add up."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the configuration: dotted keys, plain values."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a finished file, below ``folder`` of the run's artifacts."""

    def close(self, status: str = "finished") -> None:
        """Flush and let go. ``status``: "finished", "failed" or "killed"."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: ``{"parallel": {"tp": 2}}`` -> ``{"parallel.tp": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
