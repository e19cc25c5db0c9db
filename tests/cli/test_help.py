"""What the command line says of itself, and that saying it is cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_help_lists_every_command_without_importing_torch():
    program = (
        "import sys; from megatron_rl.cli import main; sys.argv = ['megatron-rl', '--help']\n"
        "try: main()\n"
        "finally: print('imported:', sorted({'torch', 'transformers', 'megatron.core'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("train", "convert", "plan", "info"):
        assert f" {name} " in done.stdout
    assert "imported: []" in done.stdout


@pytest.mark.parametrize(
    ("name", "taught"),
    [
        ("train", ["torchrun --nproc-per-node 4", "--nnodes 2", "--check"]),
        ("convert", ["--to hf", "--tp 2 --pp 2"]),
        ("plan", ["--rollout-nodes 64", "--json"]),
    ],
)
def test_help_of_a_command_shows_examples(command, name, taught):
    shown = " ".join(command(name, "--help").out.replace("│", " ").split())
    for part in taught:
        assert part in shown


def test_an_unknown_command_is_an_error_of_one_code(command):
    assert command("trian").code == 2
