"""Schedulers' variables: read as torch.distributed expects them, or refused; and two such processes are one world."""

from __future__ import annotations

import pytest
from forked import run_forked, run_ranks
from torchrun import free_port

from megatron_rl.devices.launch import LaunchError, first_host, launcher_variables

STEP = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[01-02]"}


def variables(rank: str, size: str, local: str, address: str, port: str) -> dict[str, str]:
    return {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_ADDR": address, "MASTER_PORT": port}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"RANK": "0", **STEP}, {}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}),
        ({"SLURM_NTASKS": "8"}, {}),  # a shell of salloc: no task
        ({**STEP, "MASTER_ADDR": "a"}, variables("3", "8", "1", "a", "29500")),
        (
            {**STEP, "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "5123", "SLURM_STEP_NUM_TASKS": "6"},
            variables("3", "6", "1", "gpu07", "29623"),
        ),
        ({**BATCH, "MASTER_ADDR": "a", "MASTER_PORT": "7"}, variables("0", "4", "0", "a", "7")),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            variables("1", "2", "0", "127.0.0.1", "29500"),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "a"}, variables("1", "2", "0", "a", "29500")),
    ],
)
def test_what_is_read(environ, expected):
    assert launcher_variables(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (STEP, "neither MASTER_ADDR nor a list of nodes"),
        (BATCH, "shell of a Slurm job with 4 tasks"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 ranks"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "mpirun started 4 ranks"),
    ],
)
def test_what_is_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        launcher_variables(environ)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("", ""), ("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],x", "gpu07"), ("r[3,5]-ib", "r3-ib"), ("a-b[1]", "a-b1")],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


PROGRAM = """
import os, sys
ours = {"SLURM_PROCID": os.environ["RANK"], "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
for name in [*os.environ]:
    if name.startswith("TORCHELASTIC_") or "RANK" in name or "WORLD_SIZE" in name:
        del os.environ[name]
os.environ.update(ours)

from megatron_rl.devices import current_platform
current_platform().init_process_group(60)
import torch, torch.distributed as dist
value = torch.ones(1)
dist.all_reduce(value)
print("WORLD", dist.get_rank(), dist.get_world_size(), int(value))
"""


@pytest.mark.distributed
def test_two_tasks_of_slurm_are_one_world(tmp_path):
    """Two forks that take Slurm's variables in place of torchrun's."""
    (tmp_path / "program.py").write_text(PROGRAM)
    out = run_ranks(tmp_path / "program.py", 2, free_port(), timeout=180)
    assert [line for line in out.splitlines() if "WORLD" in line] == [f"WORLD {rank} 2 2" for rank in range(2)]


@pytest.mark.distributed
def test_the_shell_of_a_batch_job_is_refused_in_one_line(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text("model: nowhere\n")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    ended = run_forked("-m", "megatron_rl", "train", config, **BATCH)
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert "start it with srun" in line
