"""`Platform` on CPU: one world without torchrun, exact random states, and a peak of memory that can start anew."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from forked import run_alone

from megatron_rl.devices import Platform, current_platform

CPU = Platform("cpu", "gloo", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_a_machine_without_gpu_is_cpu_and_gloo() -> None:
    assert current_platform() == CPU


def test_local_rank_picks_the_gpu_and_too_many_processes_are_an_error(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert current_platform() == Platform("cuda", "nccl", torch.device("cuda", 1))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RuntimeError, match=r"LOCAL_RANK=2, but this machine shows 2 GPUs: .*--nproc-per-node 2"):
        current_platform()


ALONE = """
import torch
import torch.distributed as dist
from megatron_rl.devices import Platform

Platform("cpu", "gloo", torch.device("cpu")).init_process_group(timeout=30)
print(dist.get_rank(), dist.get_world_size(), dist.get_backend())
dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
dist.destroy_process_group()
"""


def test_without_torchrun_the_world_is_this_process(tmp_path) -> None:
    program = tmp_path / "alone.py"  # other tests of this process may have a world already
    program.write_text(ALONE)
    assert run_alone(program, timeout=100) == "0 1 gloo\n"


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_a_restored_random_state_repeats_the_draws_of_every_generator() -> None:
    CPU.seed_all(11)
    first = draw()
    state = CPU.rng_state()
    after = draw()
    CPU.set_rng_state(state)
    assert draw() == after
    CPU.seed_all(11)
    assert draw() == first


def test_a_random_state_from_the_other_device_is_refused() -> None:
    with pytest.raises(ValueError, match="taken on cpu, but this process runs on cuda"):
        Platform("cuda", "nccl", torch.device("cuda", 0)).set_rng_state(CPU.rng_state())


def test_peak_memory_rises_with_an_allocation_and_starts_anew_after_reset() -> None:
    CPU.reset_peak_memory()
    base = CPU.peak_memory_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    peak = CPU.peak_memory_bytes()
    assert base + (60 << 20) < peak < base + (100 << 20)
    del held
    assert CPU.peak_memory_bytes() > peak - (4 << 20)  # the kernel batches its counters
    CPU.reset_peak_memory()
    assert CPU.peak_memory_bytes() < peak - (50 << 20)
