"""A complete small training run for tests: a random Llama, arithmetic prompts, and the YAML that trains it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from threading import Timer

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rl.batch import Batch
from megatron_rl.config import load_user_object
from megatron_rl.tracking import read_metrics
from megatron_rl.trainer import Callback, TrainingLoop

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "run" / "train_program.py"
ARITHMETIC = ROOT / "examples" / "arithmetic_grpo" / "arithmetic.py"


def environment(**extra: str) -> dict[str, str]:
    """This process's, for a run: the project, the tests and these programs on the path, one thread each."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "run"), os.environ.get("PYTHONPATH", "")]
    return (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"} | extra
    )


def write_run(folder: Path, **sections: object) -> Path:
    """Write model, tokenizer, data and config.yaml below ``folder``; returns the YAML's path.

    ``sections`` replace top-level keys of the configuration.
    """
    build_tokenizer = load_user_object(f"{ARITHMETIC}:build_tokenizer")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 20) for b in range(10, 14)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values: dict[str, object] = {
        "model": str(folder / "model"),
        "algorithm": {"name": "grpo", "num_mini_batches": 2, "kl_coefficient": 0.01},
        "reference": {},
        "actor": {
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "decay": "cosine"},
            "sampling": {"n": 4, "max_tokens": 5},
        },
        "data": {"path": str(folder / "train.jsonl")},
        "prompts_per_step": 8,
        "rewards": [{"name": f"python:{__file__}:digits"}],
        "trainer": {"output_dir": str(folder / "out"), "num_steps": 6, "save_every": 2, "export": False},
        "tracking": {"trackers": ["jsonl"]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def digits(sample) -> float:
    """Share of even digits: dense enough that a random model's advantages are never all zero."""
    return sum(c in "02468" for c in sample.response_text) / 5


def metrics_of(output_dir: Path) -> dict[int, dict[str, float]]:
    """Everything tracked but times, by step."""
    found = read_metrics(output_dir / "metrics.jsonl")
    return {s: {k: v for k, v in m.items() if not k.startswith("time/")} for s, m in found.items()}


class KillOnce(Callback):
    """Kills one rank in the beginning of a step, the first time round.

    $KILL: its rank, the number of steps done before, and the file that says that it happened.
    """

    variable = "KILL"

    def on_step_begin(self, trainer: TrainingLoop, batch: Batch) -> None:
        if self.variable not in os.environ:
            return
        rank, step, mark = os.environ[self.variable].split(maxsplit=2)
        if trainer.context.rank == int(rank) and trainer.step == int(step) and not Path(mark).exists():
            Path(mark).write_text("killed")
            self.prepare(trainer)
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(self, trainer: TrainingLoop) -> None:
        """What happens just before."""


class DamageOnce(KillOnce):
    """As `KillOnce` with $DAMAGE; a bit of the weights in the newest checkpoint is flipped before."""

    variable = "DAMAGE"

    def prepare(self, trainer: TrainingLoop) -> None:
        flip_a_bit(trainer.output_dir / "checkpoints" / f"step_{trainer.step:06d}")


def flip_a_bit(checkpoint: Path) -> str:
    """In the middle of its largest file, whose name is returned."""
    path = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path.name


class Trained(Callback):
    """Writes which prompts each step trained on, and the oldest version of each sample's tokens."""

    def on_step_end(self, trainer: TrainingLoop, batch: Batch, metrics: dict[str, float]) -> None:
        found = [(sample.prompt.index, sample.policy_version_spans[0][0]) for sample in batch.samples]
        with Path(trainer.output_dir, "trained.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.step, "samples": found}) + "\n")


class StopAfterTwo(Callback):
    """Ends the run after its second step."""

    def on_step_end(self, trainer: TrainingLoop, batch: Batch, metrics: dict[str, float]) -> None:
        if trainer.step == 2:
            trainer.stop("it was asked for")


class Hold(Callback):
    """Every rank stays in the beginning of step 2 until $HOLD_UNTIL exists, at most three minutes."""

    def on_step_begin(self, trainer: TrainingLoop, batch: Batch) -> None:
        if trainer.step == 1 and "HOLD_UNTIL" in os.environ:
            Path(f"{os.environ['HOLD_UNTIL']}.held").touch()
            deadline = time.monotonic() + 180
            while not Path(os.environ["HOLD_UNTIL"]).exists() and time.monotonic() < deadline:
                time.sleep(0.1)


def slow_digits(sample) -> float:
    """As `digits`; never ends once $SLOW exists, though it lets no Exception pass."""
    while "SLOW" in os.environ and Path(os.environ["SLOW"]).exists():
        try:
            time.sleep(60)
        except Exception:
            return 0.0
    return digits(sample)


class SlowFrom(Callback):
    """In the beginning of step 4, $SLOW is made. Three seconds later rank 0 sends SIGTERM to torchrun.

    With $SLOW_WHAT "sampling", rank 1's engine never answers again.
    """

    def on_step_begin(self, trainer: TrainingLoop, batch: Batch) -> None:
        if trainer.step != 3 or "SLOW" not in os.environ:
            return
        slow = Path(os.environ["SLOW"])
        slow.touch()
        if trainer.context.rank == 0:
            Timer(3, end_torchrun, (slow.with_suffix(".told"),)).start()
        elif os.environ["SLOW_WHAT"] == "sampling":
            trainer.checkpoints.states["rollouts"].engine.generate = lambda *_, **__: time.sleep(600)


def end_torchrun(mark: Path) -> None:
    mark.touch()
    os.kill(os.getppid(), signal.SIGTERM)


def many_even_digits(sample) -> float:
    """0 or 1: many groups have equal rewards."""
    return float(digits(sample) > 0.5)
