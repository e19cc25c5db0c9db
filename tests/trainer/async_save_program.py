"""Test program: a loop around a flow that only waits, with the real checkpoints written in the background.

Prints, as JSON, the step at which the checkpoint of step 1 was seen complete, and what lies there at the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.batch import Batch, Prompt
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.trainer import Callback, TrainerConfig, TrainingLoop
from megatron_rl.trainer.checkpoint import DistributedCheckpoints

NUM_STEPS = 600  # of 0.1 s: far more than the writer needs to start


class Source:
    steps_per_epoch = 1

    def next_batch(self) -> Batch:
        return Batch(prompts=[Prompt([1])])

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class SaveOnceAndWatch(Callback):
    seen_at = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, trainer: TrainingLoop, batch: Batch, metrics: dict[str, float]) -> None:
        if trainer.step == 1:
            trainer.checkpoints.save(trainer)
        elif (self.folder / "step_000001").is_dir():
            self.seen_at = trainer.step
            trainer.stop("the checkpoint is complete")


def main(output_dir: Path) -> None:
    context = ParallelContext.create(ParallelSizes(), seed=0)
    folder = output_dir / "checkpoints"
    watch = SaveOnceAndWatch(folder)
    wait = Flow((Stage("test.wait", lambda batch: time.sleep(0.1), reads=("prompts",)),))
    config = TrainerConfig(output_dir=str(output_dir), num_steps=NUM_STEPS, save_at_end=False)
    checkpoints = DistributedCheckpoints(folder, context, {}, {}, asynchronous=True)
    TrainingLoop(wait, Source(), context, config, checkpoints=checkpoints, callbacks=[watch]).train()
    print(json.dumps({"seen_at": watch.seen_at, "left": sorted(path.name for path in folder.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
