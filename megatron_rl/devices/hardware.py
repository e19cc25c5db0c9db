"""`Platform`: the device and the communication backend of this process, chosen once from what torch can see.

Everything that would otherwise read ``torch.cuda`` or name a backend asks this record:
`current_platform().init_process_group()`, `.device`, `.peak_memory_bytes()`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import resource
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import torch.distributed as dist

from megatron_rl.devices.launch import join_launcher
from megatron_rl.devices.rendezvous import store_of_this_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RngState:
    """Every random generator a step may use; holds plain tensors and Python values, so it can be saved."""

    python: Any
    numpy: Any
    torch_cpu: torch.Tensor
    device: torch.Tensor | None  # None on CPU, where the device's generator is the CPU's


@dataclass(frozen=True, slots=True)
class Platform:
    """One process's device: ``cuda`` with NCCL, or ``cpu`` with gloo."""

    name: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    device: torch.device

    @property
    def host_backend(self) -> Literal["gloo"]:
        """Backend for Python objects and tensors in host memory."""
        return "gloo"

    def init_process_group(self, timeout: float = 1800.0) -> None:
        """Join torchrun's world, or make a world of one when torchrun did not start this process.

        Args:
            timeout: seconds after which a collective that a peer never joined fails.
        """
        store, rank, world_size = self.rendezvous(timeout)
        self.init_world(store, rank, world_size, timeout)

    def rendezvous(self, timeout: float) -> tuple[dist.Store, int, int]:
        """A store of all ranks that torchrun started, this process's rank and their number; a world of one without
        torchrun. Collective."""
        limit = timedelta(seconds=timeout)
        if "RANK" not in os.environ:
            # A store in memory: no port is opened, so any number of single-process runs can share a machine.
            return dist.HashStore(), 0, 1
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        return store_of_this_start(store, rank, world_size, timeout), rank, world_size

    def init_world(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        """Make the default process group of the ranks that use ``store``."""
        self.set_device()
        limit = timedelta(seconds=timeout)
        dist.init_process_group(self.backend, store=store, rank=rank, world_size=world_size, timeout=limit)

    def set_device(self) -> None:
        """Make `device` the default of CUDA calls in this process; nothing on CPU."""
        if self.name == "cuda":
            torch.cuda.set_device(self.device)

    def seed_all(self, seed: int) -> None:
        """Seed Python's, numpy's and torch's generators, the device's included."""
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def rng_state(self) -> RngState:
        """A copy of every generator's state, for exact resume."""
        device = torch.cuda.get_rng_state(self.device) if self.name == "cuda" else None
        return RngState(random.getstate(), numpy.random.get_state(), torch.get_rng_state(), device)

    def set_rng_state(self, state: RngState) -> None:
        """Restore what `rng_state` returned.

        Raises:
            ValueError: the state was taken on the other kind of device.
        """
        if (state.device is not None) != (self.name == "cuda"):
            taken = "cpu" if state.device is None else "cuda"
            raise ValueError(f"this random state was taken on {taken}, but this process runs on {self.name}")
        random.setstate(state.python)
        numpy.random.set_state(state.numpy)
        torch.set_rng_state(state.torch_cpu)
        if state.device is not None:
            torch.cuda.set_rng_state(state.device, self.device)

    def peak_memory_bytes(self) -> int:
        """Most device memory held at once since `reset_peak_memory`; on CPU, the peak resident set of the process."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_peak_memory(self) -> None:
        """Start a new peak. Without a writable /proc the peak stays that of the whole process."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        counter = Path("/proc/self/clear_refs")
        if os.access(counter, os.W_OK):
            counter.write_text("5")  # proc(5): 5 resets the peak resident set, VmHWM

    def synchronize(self) -> None:
        """Wait until the device has finished everything queued."""
        if self.name == "cuda":
            torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        """Give cached, unused device memory back to the driver."""
        if self.name == "cuda":
            torch.cuda.empty_cache()


def warn_of_shared_store() -> None:
    """For a job that created its process group itself: torchrun's agents give it a store that keeps the addresses of
    dead ranks over restarts (see `devices.rendezvous`), with which a restart can fail."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        logger.warning(
            "this job called torch.distributed.init_process_group itself: after a restart by torchrun it can fail to "
            "reconnect. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or call "
            "megatron_rl.devices.current_platform().init_process_group() instead"
        )


def current_platform() -> Platform:
    """The platform of this process; with several GPUs, torchrun's LOCAL_RANK (or a scheduler's) picks the device.

    Raises:
        LaunchError: a scheduler started several ranks that cannot meet.
        RuntimeError: torchrun started more processes on this machine than it has visible GPUs.
    """
    join_launcher()
    if not torch.cuda.is_available():
        return Platform("cpu", "gloo", torch.device("cpu"))
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= visible:
        raise RuntimeError(
            f"LOCAL_RANK={local_rank}, but this machine shows {visible} GPUs: start torchrun with "
            f"--nproc-per-node {visible}, or widen CUDA_VISIBLE_DEVICES"
        )
    return Platform("cuda", "nccl", torch.device("cuda", local_rank))


def use_transformer_engine() -> bool:
    """TransformerEngine is installed and this process has a GPU."""
    return current_platform().name == "cuda" and importlib.util.find_spec("transformer_engine") is not None
