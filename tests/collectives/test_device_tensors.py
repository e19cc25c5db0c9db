"""Reductions of CUDA tensors through pinned node memory, summed on the device; rehearsed on CPU tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from ops.gpu_device import only_on_a_gpu
from torchrun import run_torchrun

PROGRAM = Path(__file__).with_name("device_program.py")


@pytest.mark.distributed
def test_the_program_is_right_on_cpu_tensors():
    assert run_ranks(PROGRAM, 4, "cpu", timeout=200).count("held: ") == 2


@only_on_a_gpu[0]
@only_on_a_gpu[1]
def test_cuda_tensors_are_reduced_to_the_same_bits_in_the_order_of_their_stream():
    assert run_torchrun(PROGRAM, 4, "cuda", timeout=400).count("held: ") == 2
