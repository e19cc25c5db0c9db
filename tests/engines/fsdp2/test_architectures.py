"""Architectures without a family under FSDP2: the same steps as one process takes, generation and export."""

from __future__ import annotations

from pathlib import Path

from engines.fsdp2.tiny_models import CONFIGS
from forked import run_ranks

PROGRAM = Path(__file__).with_name("architecture_program.py")


def test_steps_generation_and_export_are_those_of_one_process(tmp_path):
    for ranks in (1, 2):
        lines = run_ranks(PROGRAM, ranks, tmp_path, *CONFIGS, timeout=400).splitlines()
        assert sum("largest relative difference" in line for line in lines) == len(CONFIGS)
