"""`WandbTracker`: a Weights & Biases run; ``mode: offline`` keeps it in ``<output_dir>/wandb`` for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.names import LegalNames
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

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
        known = kept.read_text().strip() if resume_step is not None and kept.exists() else None
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

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # W&B's own step counter refuses to go back, as it must after a resume; our step is a metric beside it.
        self._run.log({**{self._names(name): value for name, value in metrics.items()}, "step": step})

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._run.config.update(dict(params), allow_val_change=True)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._run.save(str(path), base_path=str(Path(path).parent), policy="now")

    def close(self, status: str = "finished") -> None:
        if self._run is not None:
            self._run.finish(exit_code=EXIT_CODES[status])
