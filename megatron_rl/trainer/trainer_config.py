"""`TrainerConfig`: length of a run, evaluation, checkpoints and outputs."""

from __future__ import annotations

from pydantic import Field

from megatron_rl.config import ConfigRecord


class TrainerConfig(ConfigRecord):
    """The loop around a flow."""

    output_dir: str = "outputs/run"
    """Folder for checkpoints, logs, plots and the exported model."""
    num_steps: int | None = Field(default=None, ge=0)
    """Steps (calls of the flow) of the whole run; None = `num_epochs` over the data."""
    num_epochs: float = Field(default=1.0, gt=0, le=1e9)
    """Passes over the data when `num_steps` is not given."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 = none during training."""
    evaluate_at_start: bool = True
    """Evaluate before the first step of a fresh run, where there is something to evaluate on."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 = only at the end."""
    save_at_end: bool = True
    """Write a checkpoint after the last step."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    verify_checkpoints: bool = True
    """Compare a checkpoint's files with their digests before the run continues from it."""
    async_save: bool = False
    """Write checkpoints in the background during training."""
    export: bool = True
    """Write a Hugging Face folder, ``<output_dir>/hf``, at the end."""
    resume: str = "auto"
    """auto = continue from the newest complete checkpoint of `output_dir` if there is one; never = start afresh (an
    output folder with checkpoints is then refused); or the path of a checkpoint."""
    grace_seconds: float = Field(default=25.0, gt=0)
    """Seconds that a run may take to end after SIGTERM, SIGINT or SIGHUP: half of them for the step, which is then
    abandoned if it is still sampling or computing rewards, the rest for saving. Then the process is ended. torchrun
    kills after 30."""
    log_every: int = Field(default=1, ge=1)
    """Steps between tracked lines."""

    trace: int = Field(default=0, ge=0)
    """Steps from the start whose stages, pushes and waiting are drawn in ``<output_dir>/trace.json``, a Chrome trace
    that https://ui.perfetto.dev opens; 0 = none."""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run; ``steps_per_epoch`` is what one pass over the data takes."""
        if self.num_steps is not None:
            return self.num_steps
        return max(1, round(self.num_epochs * steps_per_epoch))
