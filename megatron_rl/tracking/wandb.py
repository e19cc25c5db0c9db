"""`WandbTracker`: a Weights & Biases run; ``mode: offline`` keeps it in ``<output_dir>/wandb`` for ``wandb sync``.

W&B's server takes no step twice: of steps that a resumed run trains again it keeps the first values. An offline run's
files are cut at the checkpoint instead, and removed where a run that did not finish starts anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.names import LegalNames
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker
from megatron_rl.tracking.wandb_file import is_finished, keep_through

RUN_ID_FILE = "wandb_run_id"
ILLEGAL = r"[^/\w.\- :@()]|^_+"  # names that begin with _ are W&B's own
MAX_CHARS = 128  # of the names of projects and runs
EXIT_CODES = {"finished": 0, "failed": 1, "killed": 1}


@TRACKERS.register("wandb")
class WandbTracker(Tracker):
    """One W&B run; the experiment is its project. A resumed run continues it."""

    class Config(ConfigRecord):
        """How the run is kept."""

        mode: Literal["online", "offline"] = "online"
        """Send as the run goes (needs WANDB_API_KEY or a login), or write to disk only."""
        entity: str = ""
        """Team or user; empty means the account's default."""

    config: Config
    package: ClassVar[str] = "wandb"

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        super().__init__(run, config)
        import wandb

        self._init = wandb.init
        self._run: Any = None
        self._names = LegalNames(ILLEGAL)

    def start(self, resume_step: int | None = None) -> None:
        kept = self.run.output_dir / RUN_ID_FILE
        known = kept.read_text().strip() if kept.exists() else None
        if known and self.config.mode == "offline":
            self._forget(known, resume_step)
        if resume_step is None:
            known = None
        self._run = self._init(
            project=LegalNames(r"[/\\#?%:]", MAX_CHARS)(self.run.experiment),
            name=self.run.name[:MAX_CHARS],
            dir=str(self.run.output_dir),
            entity=self.config.entity or None,
            mode=self.config.mode,
            id=known,
            resume="allow" if known else None,
        )
        kept.write_text(self._run.id + "\n")

    def _forget(self, run_id: str, resume_step: int | None) -> None:
        """Cut the run's offline files after ``resume_step``; None = remove them, if the run did not finish."""
        files = sorted((self.run.output_dir / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
        finished = any(is_finished(file) for file in files)
        for file in files:
            if resume_step is not None:
                keep_through(file, resume_step)
            elif not finished:
                shutil.rmtree(file.parent)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # W&B's own step is ours; the metric beside it is for its charts.
        self._run.log({**{self._names(name): value for name, value in metrics.items()}, "step": step}, step=step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._run.config.update(dict(params), allow_val_change=True)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._run.save(str(path), base_path=str(Path(path).parent), policy="now")

    def close(self, status: str = "finished") -> None:
        if self._run is not None:
            self._run.finish(exit_code=EXIT_CODES[status])
