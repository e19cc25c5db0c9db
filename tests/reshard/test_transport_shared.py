"""A reshard into the memory of another process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from reshard.random_layouts import assert_bitwise_equal, logical_values
from reshard.test_plan import rows_layout

from megatron_rl.reshard import LocalTransport, Resharder
from megatron_rl.reshard.transport_shared import export_tensors, finish_writes, import_tensors

ENGINE = """
import sys, torch
from megatron_rl.reshard.transport_shared import export_tensors
device = sys.argv[1]
own = torch.zeros(10, 4, dtype=torch.bfloat16, device=device)
print(export_tensors({"b.w": own[1:9]}).hex(), flush=True)
sys.stdin.readline()
print(own.float().cpu().tolist(), flush=True)
sys.stdin.readline()
"""


def reshard_into_another_process(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    full = logical_values({"w": (8, 4)})["w"].to(device)
    command = [sys.executable, "-c", ENGINE, device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        targets = import_tensors(bytes.fromhex(engine.stdout.readline()))
        resharder = Resharder(rows_layout("a", [0], 1), rows_layout("b", [0], 1), 0, LocalTransport())
        resharder.run({"a.w": full}, targets)
        finish_writes(targets)
        engine.stdin.write("\n")
        engine.stdin.flush()
        seen = torch.tensor(eval(engine.stdout.readline()))
        del targets
        engine.stdin.write("\n")
        engine.stdin.flush()
    return seen, full.cpu()


def test_weights_are_written_straight_into_the_memory_of_an_engine_process() -> None:
    seen, full = reshard_into_another_process("cpu")
    assert_bitwise_equal(seen[1:9].contiguous(), full.bfloat16().float(), "w")
    assert not seen[0].any()
    assert not seen[9].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a GPU")
def test_weights_are_written_straight_into_an_engine_on_the_same_gpu() -> None:
    seen, full = reshard_into_another_process("cuda")
    assert_bitwise_equal(seen[1:9].contiguous(), full.bfloat16().float(), "w")


def test_an_exported_tensor_stays_the_same_tensor() -> None:
    own = torch.arange(6.0).view(2, 3)
    (other,) = import_tensors(export_tensors({"own": own})).values()
    other[1, 2] = 9.0
    assert own[1, 2] == 9.0
    assert other.shape == own.shape
