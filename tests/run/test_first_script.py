"""Scripts as people write them first: without ``if __name__ == "__main__"``, from a thread, standard input or exec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_ranks
from safetensors import safe_open
from small_run import environment, write_run
from transformers import AutoModelForCausalLM

# Each process that runs or imports the text leaves a line in the file "runs".
SCRIPT = """
import os
with open("runs", "a") as file:
    file.write(f"{os.getpid()}\\n")

from transformers import AutoTokenizer
from megatron_rl import SFTTrainer
from megatron_rl.engines.conversion import convert

rows = [{"prompt": "1" * 200, "completion": "2"}]  # skipped: longer than the model
rows += [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(10, 26)]
def train(output_dir):
    trainer = SFTTrainer(model="model", tokenizer=AutoTokenizer.from_pretrained("model"), dataset=rows)
    trainer.train(per_device_train_batch_size=4, max_steps=1, learning_rate=1e-3, output_dir=output_dir)

train("first")
"""

MORE = """
import threading
thread = threading.Thread(target=train, args=("thread",))
thread.start()
thread.join()
exec("train('exec')")
convert("first/hf", "converted", "megatron")
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a model in bfloat16."""
    write_run(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path


def run(command: list[str], folder: Path, text: str | None = None, umask: int = -1) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(), input=text, capture_output=True, text=True,
        timeout=300, umask=umask, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def after_the_script(workplace: Path) -> Path:
    (workplace / "script.py").write_text(SCRIPT + MORE)
    shown = run(["script.py"], workplace, umask=0o027)
    for noise in ("Unknown MLP type", "Token indices sequence length", "Traceback"):
        assert noise not in shown
    assert "elapsed 0:" in shown
    assert "left 0:00:00" in shown
    return workplace


def test_a_script_without_a_guard_trains_in_a_thread_twice_and_converts(after_the_script):
    folder = after_the_script
    assert len((folder / "runs").read_text().splitlines()) == 1
    for name in ("first", "thread", "exec"):
        assert (folder / name / "hf" / "model.safetensors").is_file(), name
        assert (folder / name / "checkpoints" / "step_000001" / ".metadata").is_file(), name
    assert (folder / "first" / "training_curve.png").is_file()
    assert (folder / "converted" / "release" / ".metadata").is_file()
    check_modes(folder, umask=0o027)
    # A folder in bfloat16 stays one, though training was in float32.
    with safe_open(folder / "first" / "hf" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def check_modes(folder: Path, umask: int) -> None:
    """Everything below the output folders is as readable as ``umask`` says, no less."""
    found = {}
    for name in ("first", "converted"):
        for path in [folder / name, *(folder / name).rglob("*")]:
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            if path.stat().st_mode & 0o777 != expected:
                found[str(path.relative_to(folder))] = oct(path.stat().st_mode)
    assert found == {}


def test_standard_input_of_an_interactive_interpreter_is_no_hindrance(workplace):
    shown = run(["-i", "-"], workplace, text=SCRIPT)
    assert "Error" not in shown
    assert len((workplace / "runs").read_text().splitlines()) == 1
    assert (workplace / "first" / "hf" / "model.safetensors").is_file()


@pytest.mark.distributed
def test_the_same_script_on_two_ranks(workplace):
    (workplace / "script.py").write_text(SCRIPT)
    run_ranks(workplace / "script.py", 2, timeout=200, directory=workplace)
    assert len((workplace / "runs").read_text().splitlines()) == 2
    assert (workplace / "first" / "hf" / "model.safetensors").is_file()
