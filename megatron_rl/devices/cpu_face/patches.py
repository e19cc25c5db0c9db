"""Patches of Megatron-Core modules, as data, for what rewriting single expressions cannot do.

Each runs once, on the module just imported, before anything else has seen its names.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

KNOWN_VERSIONS = {"0.16.1": "tested", "0.19.2": "checked"}  # megatron-core releases this face has run with


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch: the module and symbols it replaces, and why; ``upstream`` cites megatron-core 0.16.1."""

    module: str
    symbols: tuple[str, ...]
    apply: Callable[[ModuleType], None]
    reason: str
    upstream: str


def _check_version(module: ModuleType) -> None:
    version = module.__version__.split("+")[0]  # what is built from a checkout carries its commit
    if version not in KNOWN_VERSIONS:
        known = ", ".join(f"{name} ({state})" for name, state in KNOWN_VERSIONS.items())
        warnings.warn(
            f"megatron-core {version} has not been tried on CPU with megatron_rl; known versions: {known}. "
            "Check a small run against one process before you trust it",
            stacklevel=2,
        )


def _run_fusions_eagerly(module: Any) -> None:
    module.enable_jit_fuser = module.disable_jit_fuser
    module.disable_jit_fuser()


def _use_cpu_generator(module: Any) -> None:
    # The rewritten module's torch.cuda is the stand-in: reuse its one definition of the CPU's generator.
    cpu = module.__torch_cuda__

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> Any:
        return cpu.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        cpu.set_rng_state(new_state)

    module._get_cuda_rng_state, module._set_cuda_rng_state = get_state, set_state


def _expect_one_generator(module: ModuleType) -> None:
    def keep(record: logging.LogRecord) -> bool:
        return record.msg != "CPU RNG state changed within GPU RNG context"

    logging.getLogger(module.__name__).addFilter(keep)


def _without_te_gemm(module: Any) -> None:
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


def _split_sizes_as_lists(module: Any) -> None:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.tolist() if as_numpy and hasattr(tensor, "tolist") else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


PATCHES = (
    Patch(
        "megatron.core.package_info",
        (),
        _check_version,
        "a version this face has never run with deserves one warning",
        "package_info.py __version__",
    ),
    Patch(
        "megatron.core.jit",
        ("jit_fuser", "enable_jit_fuser"),
        _run_fusions_eagerly,
        "torch.compile costs about 20 s of CPU for each fused function and gains nothing here",
        "jit.py:21 enable_jit_fuser",
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        ("_get_cuda_rng_state", "_set_cuda_rng_state"),
        _use_cpu_generator,
        "the setter queues its work until CUDA starts, which never happens: the tracker would silently not fork",
        "tensor_parallel/random.py:40, :71",
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        (),
        _expect_one_generator,
        "CPU and device share one generator, so drawing inside a fork is no mistake and each draw would log a warning",
        "tensor_parallel/random.py:265 CudaRNGStatesTracker.fork",
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils",
        ("te_general_gemm",),
        _without_te_gemm,
        "the router compares a name with None that is only defined where TransformerEngine is installed",
        "transformer/moe/moe_utils.py:1192 RouterGatingLinearFunction.forward",
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        ("maybe_move_tensor_to_cpu",),
        _split_sizes_as_lists,
        "split sizes become host values only when they are CUDA tensors; gloo's all-to-all wants host values",
        "transformer/moe/moe_utils.py:1078 maybe_move_tensor_to_cpu",
    ),
)
