"""Who started this process: torchrun, or a scheduler whose variables are translated into torchrun's.

`srun` with one task a rank, and `mpirun`, start ranks without RANK and WORLD_SIZE. Each would be a world of its own,
all of them writing into one folder, so their variables are translated into torch.distributed's, or refused.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

logger = logging.getLogger(__name__)

PORT = 29500  # torchrun's own; Slurm jobs that share a node get different ones


class LaunchError(ValueError):
    """The environment says that several ranks were started, but not where they meet."""


def join_launcher() -> None:
    """Set torchrun's variables if a scheduler started this process; nothing if they are already set.

    Raises:
        LaunchError: see `launcher_variables`.
    """
    found = launcher_variables(os.environ)
    if found:
        os.environ.update(found)
        logger.info("started by a scheduler: %s", ", ".join(f"{key}={value}" for key, value in found.items()))


def launcher_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Slurm's, Open MPI's or PMI's variables.

    Returns:
        {} where RANK is given, and where there is only one task.

    Raises:
        LaunchError: several tasks, and nothing says where rank 0 is; or a batch script's own shell, which is one
            process of a job that has several tasks.
    """
    if "RANK" in environ:
        return {}
    for name, rank, size, local in (
        ("srun", "SLURM_PROCID", _slurm_size(environ), "SLURM_LOCALID"),
        ("mpirun", "OMPI_COMM_WORLD_RANK", environ.get("OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("mpirun", "PMI_RANK", environ.get("PMI_SIZE"), "MPI_LOCALRANKID"),
    ):
        if rank in environ and int(size or 1) > 1:
            return {
                "RANK": environ[rank],
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": environ.get("LOCAL_RANK", environ.get(local, "0")),
                "MASTER_ADDR": _address(environ, name, int(size or 1)),
                "MASTER_PORT": environ.get("MASTER_PORT", str(PORT + int(environ.get("SLURM_JOB_ID", "0")) % 1000)),
            }
    return {}


def _slurm_size(environ: Mapping[str, str]) -> str | None:
    """Tasks of this step, or of the job where no step is named."""
    return environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or environ.get("SLURM_NPROCS")


def _address(environ: Mapping[str, str], launcher: str, size: int) -> str:
    given = environ.get("MASTER_ADDR")
    if given:
        return given
    remedy = "export MASTER_ADDR=<host of rank 0>, or start torchrun as the one task of each node"
    if launcher == "mpirun":
        if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", environ.get("MPI_LOCALNRANKS")) == str(size):
            return "127.0.0.1"  # all on this host
        raise LaunchError(f"mpirun started {size} ranks, and nothing says where rank 0 is: {remedy}")
    if "SLURM_STEP_ID" not in environ and "SLURM_STEP_NUM_TASKS" not in environ:
        raise LaunchError(
            f"this process runs in the shell of a Slurm job with {size} tasks, and is not one of them: start it with "
            f"srun (one task a rank), or {remedy}"
        )
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    first = first_host(hosts)
    if not first:
        raise LaunchError(f"srun started {size} ranks, and neither MASTER_ADDR nor a list of nodes is set: {remedy}")
    return first


def first_host(hosts: str) -> str:
    """The first name of Slurm's compressed list: ``"gpu[07-09,12],login1" -> "gpu07"``; "" of an empty one."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", hosts.strip())
    return "".join(part or "" for part in found.groups()) if found else ""
