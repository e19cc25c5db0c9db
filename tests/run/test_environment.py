"""The report of `megatron-rl info` against what this process can see by itself."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from megatron_rl.ops.selection import Availability, operations
from megatron_rl.run import environment


@pytest.fixture(scope="module")
def report() -> str:
    return environment.describe_environment()


def line(report: str, start: str) -> str:
    (found,) = [text.strip() for text in report.splitlines() if text.strip().startswith(start)]
    return found


def test_info_states_the_versions_in_use(report):
    assert line(report, "torch ").endswith(torch.__version__)
    for package in ("megatron-core", "transformers"):
        assert importlib.metadata.version(package) in line(report, package)


def test_info_says_when_the_cpu_face_has_never_run_a_megatron_core_version():
    assert environment.megatron_core_version("0.16.1") == "0.16.1 (tested)"
    assert environment.megatron_core_version("0.99.0").startswith("0.99.0 (not known to the CPU face, which knows 0.16")
    assert "pip install" in environment.megatron_core_version(None)


def test_info_names_every_operation_with_what_runs(report):
    below = report.split("Operations on ")[1]
    for op in operations():
        assert line(below, f"{op} ").split()[1] in ("reference", "cpu", "triton", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_info_gives_a_reason_for_everything_that_needs_a_gpu(report):
    assert "device              cpu" in report
    assert "csrc (CUDA)         not in use: torch sees no CUDA device" in report
    for part in ("TransformerEngine", "apex", "flash-attn", "Triton"):
        assert "not in use: " in line(report, part)


def test_a_part_is_in_use_only_where_an_operation_runs_on_it():
    reference_only = [
        Availability("gae", "triton", "cuda", False, "no GPU"),
        Availability("gae", "cpu", "cpu", True, ""),
    ]
    part = environment.kernels("Triton", "triton", "cuda", reference_only)
    assert (part.in_use, part.note) == (False, "no GPU")
