"""`MlflowTracker`: an MLflow run, by default in an SQLite store inside the output folder.

    mlflow ui --backend-store-uri sqlite:///<output_dir>/mlflow.db

A resumed run continues the same MLflow run. MLflow cannot forget single steps: where the interrupted run had recorded
steps after the checkpoint, a new MLflow run takes over what it had recorded before, and the old one is deleted.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_rl.config import ConfigRecord, masked
from megatron_rl.devices.this_machine import reach_directly
from megatron_rl.tracking.names import LegalNames
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

logger = logging.getLogger(__name__)

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow_artifacts"
RUN_ID_FILE = "mlflow_run_id"
MAX_PARAM_CHARS = 500  # the shortest limit among MLflow's stores
PARAMS_PER_CALL = 100  # MLflow refuses more in one log_batch
METRICS_PER_CALL = 1000
MAX_NAME_CHARS = 250
# mlflow.utils.validation: letters, digits and /_-. :, and no path that would be written otherwise (a//b, ../a, a/)
ILLEGAL = r"[^/\w.\- :]|^\.\.|^/+|/+$|(?<=/)/+|(?<![^/])\.{1,2}(?![^/])"
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


@TRACKERS.register("mlflow")
class MlflowTracker(Tracker):
    """One MLflow run. Names that MLflow refuses are made legal."""

    class Config(ConfigRecord):
        """Where the run is kept."""

        uri: str = ""
        """Tracking URI (http://host:5000, sqlite:///file.db); empty means <output_dir>/mlflow.db."""

    config: Config
    package: ClassVar[str] = "mlflow"
    remote: ClassVar[bool] = True

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        super().__init__(run, config)
        # Read by MLflow on import; training jobs should not report anywhere unless their owner says so.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # `Delivery` retries during outages; MLflow's own retries would go on for minutes after the run has ended.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        # Creating the store logs a line per schema migration.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        self.uri = self.config.uri or f"sqlite:///{run.output_dir / DATABASE}"
        reach_directly(self.uri)
        self._client = MlflowClient(self.uri)
        self.run_id = ""  # start() sets it
        self._names, self._param_names = LegalNames(ILLEGAL, MAX_NAME_CHARS), LegalNames(ILLEGAL, MAX_NAME_CHARS)
        self._times: dict[int, int] = {}  # of each step, in ms, so that a second try repeats the first
        logger.info("MLflow run %r: mlflow ui --backend-store-uri %s", run.name, masked(self.uri))

    def is_outage(self, error: Exception) -> bool:
        """Overload and server errors; MLflow reports a failed connection as INTERNAL_ERROR."""
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException):
            code = error.get_http_status_code()
            return code >= 500 or code in (408, 429)
        return super().is_outage(error)

    def start(self, resume_step: int | None = None) -> None:
        kept = self.run.output_dir / RUN_ID_FILE
        known = kept.read_text().strip() if kept.exists() else ""
        if known and resume_step is not None:
            history = self._history(known)
            if all(metric.step <= resume_step for metric in history):
                self._client.update_run(known, status="RUNNING")
                self.run_id = known
                return
            self._take_over(known, [metric for metric in history if metric.step <= resume_step])
        else:
            if known:
                self._discard_unfinished(known)
            self.run_id = self._create_run()
        kept.write_text(self.run_id + "\n")

    def _create_run(self, tags: Mapping[str, Any] | None = None) -> str:
        run = self._client.create_run(self._find_experiment(), run_name=self.run.name, tags=dict(tags or {}))
        return str(run.info.run_id)

    def _history(self, run_id: str) -> list[Any]:
        """Everything recorded, the newest value of each metric and step."""
        found: dict[tuple[str, int], Any] = {}
        for name in self._client.get_run(run_id).data.metrics:
            found |= {(name, metric.step): metric for metric in self._client.get_metric_history(run_id, name)}
        return sorted(found.values(), key=lambda metric: (metric.step, metric.timestamp))

    def _take_over(self, old: str, history: list[Any]) -> None:
        """A new run with the tags, parameters, artifacts and ``history`` of ``old``, which is deleted: MLflow keeps it
        among deleted runs. May be called again after an outage."""
        known = self._client.get_run(old)
        tags = {name: value for name, value in known.data.tags.items() if not name.startswith("mlflow.")}
        self.run_id = self.run_id or self._create_run({**tags, "megatron_rl.continues": old})
        self._log_in_parts(metrics=history)
        self.log_params(known.data.params)
        with tempfile.TemporaryDirectory() as folder:
            for item in self._client.list_artifacts(old):
                found = Path(self._client.download_artifacts(old, item.path, folder))
                self.log_artifact(found, item.path if item.is_dir else "")
        self._client.delete_run(old)
        logger.warning("MLflow run %s continues as %s, without the steps that are trained again", old, self.run_id)

    def _log_in_parts(self, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _discard_unfinished(self, run_id: str) -> None:
        """The run of this folder that ended before its first checkpoint: this one writes its steps again."""
        from mlflow.exceptions import MlflowException

        try:
            info = self._client.get_run(run_id).info
            if info.lifecycle_stage == "active" and info.status != STATUSES["finished"]:
                self._client.delete_run(run_id)  # MLflow keeps it among deleted runs
        except MlflowException as error:
            if self.is_outage(error):
                raise
            logger.warning("MLflow does not know run %s any more: %s", run_id, error)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = self._times.setdefault(step, time.time_ns() // 1_000_000)
        found = [Metric(self._names(name), float(value), now, step) for name, value in metrics.items()]
        self._log_in_parts(found)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters are written once; a resumed run keeps those of its start, and a changed one is warned about."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        texts = {self._param_names(name): str(value)[:MAX_PARAM_CHARS] for name, value in params.items()}
        for name in sorted(name for name in texts if known.get(name, texts[name]) != texts[name]):
            logger.warning("parameter %s is %s now; MLflow keeps %s", name, texts[name], known[name])
        new = [Param(name, text) for name, text in texts.items() if name not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_CALL])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        if Path(path).is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder or None)
        else:
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def close(self, status: str = "finished") -> None:
        if self.run_id:
            self._client.set_terminated(self.run_id, STATUSES[status])

    def _find_experiment(self) -> str:
        known = self._client.get_experiment_by_name(self.run.experiment)
        if known is not None:
            return str(known.experiment_id)
        # A server of its own knows where artifacts go; for our own store they stay in the output folder.
        place = None if self.config.uri else (self.run.output_dir / ARTIFACTS).as_uri()
        return str(self._client.create_experiment(self.run.experiment, artifact_location=place))
