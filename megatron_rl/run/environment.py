"""The report of `megatron-rl info`: versions, device, and each accelerated part with the reason where it is not used.

Nothing is decided here: every line asks the code that decides (the layer spec, the operations' registry, the face).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as host
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl import __version__
from megatron_rl.collectives.calibrations import saved_choices
from megatron_rl.devices import Platform, current_platform, use_transformer_engine
from megatron_rl.devices.cpu_face import KNOWN_VERSIONS
from megatron_rl.ops.selection import Availability, availability, choose, implementations, operations
from megatron_rl.rollout import ENGINES

WIDTH = 20  # of the first column


@dataclass(frozen=True)
class AcceleratedPart:
    """One accelerated part.

    Attributes:
        name: common name.
        in_use: whether a run on this machine goes through it.
        note: what for, or why not.
    """

    name: str
    in_use: bool
    note: str

    def __str__(self) -> str:
        return f"{self.name:{WIDTH}}{'in use: ' if self.in_use else 'not in use: '}{self.note}"


def describe_environment() -> str:
    """The report of `megatron-rl info`. Looking at compiled operations may build them once."""
    platform = current_platform()
    rows = availability()
    sections = {
        f"megatron-rl {__version__}": versions(),
        "Device": device_lines(platform),
        "Accelerated parts": [str(part) for part in accelerated_parts(platform, rows)],
        f"Operations on {platform.name}": operation_lines(platform.name, rows),
    }
    if choices := list(saved_choices()):
        sections["Reductions of gradients (collectives.all_reduce: hybrid), as calibrated"] = choices
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def versions() -> list[str]:
    """One line for each package that a run depends on."""
    packages = ("torch", "transformers", "safetensors", "mlflow", "tensorboard", "wandb")
    lines = [f"{'python':{WIDTH}}{host.python_version()}, {host.system()} {host.machine()}"]
    lines.append(f"{'megatron-core':{WIDTH}}{megatron_core_version(installed('megatron-core'))}")
    return lines + [f"{name:{WIDTH}}{installed(name) or 'not installed'}" for name in packages]


def megatron_core_version(version: str | None) -> str:
    """The version, and whether it was tested on machines without an accelerator."""
    if version is None:
        return "not installed: pip install megatron-core"
    known = ", ".join(f"{name} ({state})" for name, state in KNOWN_VERSIONS.items())
    return f"{version} ({KNOWN_VERSIONS.get(version, f'not known to the CPU face, which knows {known}')})"


def device_lines(platform: Platform) -> list[str]:
    """Device and communication backends."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    if platform.name == "cpu":
        return [
            f"{'device':{WIDTH}}cpu ({cores}); torch sees no CUDA device",
            f"{'communication':{WIDTH}}{platform.backend}",
            f"{'Megatron-Core':{WIDTH}}through the CPU face: its modules are adapted while they are imported",
        ]
    return [
        f"{'device':{WIDTH}}{platform.device} ({cores})",
        f"{'communication':{WIDTH}}{platform.backend}, {platform.host_backend} for host memory",
        f"{'Megatron-Core':{WIDTH}}as it is: an accelerator is visible, so the CPU face does nothing",
    ]


def accelerated_parts(platform: Platform, rows: Sequence[Availability]) -> list[AcceleratedPart]:
    """Every part that can make a run faster, and whether this machine uses it."""
    engine = transformer_engine(platform.name)
    return [
        engine,
        apex(platform.name, engine.in_use),
        flash_attention(engine.in_use),
        kernels("Triton", "triton", "cuda", rows),
        kernels("csrc (C++)", "cpu", "cpu", rows),
        kernels("csrc (CUDA)", "cuda", "cuda", rows),
        sglang(),
    ]


def transformer_engine(device: str) -> AcceleratedPart:
    """The layers of the model."""
    if use_transformer_engine():
        return AcceleratedPart("TransformerEngine", True, "layers of models built from Hugging Face")
    reason = "no GPU" if importable("transformer_engine") else "not installed"
    if device == "cpu" and reason == "not installed":
        reason = "not installed, and it needs a GPU"
    return AcceleratedPart("TransformerEngine", False, f"{reason}; local layers with our norm and attention instead")


def apex(device: str, engine_in_use: bool) -> AcceleratedPart:
    """Megatron-Core takes fused optimizers from TransformerEngine first, then from apex (optimizer/__init__.py)."""
    if not importable("apex"):
        fallback = "TransformerEngine's" if engine_in_use else "torch's"
        return AcceleratedPart("apex", False, f"not installed; Megatron-Core takes {fallback} optimizers")
    if device == "cpu":
        return AcceleratedPart("apex", False, "it needs a GPU")
    if engine_in_use:
        return AcceleratedPart("apex", False, "Megatron-Core prefers TransformerEngine's optimizers")
    return AcceleratedPart("apex", True, "Megatron-Core's fused optimizers")


def flash_attention(engine_in_use: bool) -> AcceleratedPart:
    """Reached through TransformerEngine's attention only."""
    if not importable("flash_attn"):
        return AcceleratedPart("flash-attn", False, "not installed")
    if not engine_in_use:
        return AcceleratedPart("flash-attn", False, "it works through TransformerEngine, which is not in use")
    return AcceleratedPart("flash-attn", True, "TransformerEngine's attention, where it chooses to")


def kernels(name: str, implementation: str, device: str, rows: Sequence[Availability]) -> AcceleratedPart:
    """One compiler's implementations of our operations."""
    ours = [row for row in rows if row.implementation == implementation and row.device_type == device]
    reasons = sorted({row.reason for row in ours if not row.available})
    chosen = [row.op for row in ours if row.available and running(row.op, device) == implementation]
    if chosen:
        return AcceleratedPart(name, True, ", ".join(chosen))
    return AcceleratedPart(name, False, "; ".join(reasons) or "another implementation of every operation is preferred")


def sglang() -> AcceleratedPart:
    """The rollout engine for real models."""
    version = installed("sglang")
    if "sglang" not in ENGINES:
        return AcceleratedPart("SGLang", False, "this version has no engine for it; rollouts run on the local engine")
    if version is None:
        return AcceleratedPart(
            "SGLang", False, "not installed (pip install 'megatron-rl[sglang]'); the local engine works"
        )
    return AcceleratedPart("SGLang", True, f"{version}, where a run says actor.rollout.engine: sglang")


def operation_lines(device: str, rows: Sequence[Availability]) -> list[str]:
    """For each operation the implementation in use, and why no better one is."""
    lines = []
    for op in operations():
        chosen = running(op, device)
        better = implementations(op)[: implementations(op).index(chosen)]
        missing = "; ".join(
            f"{r.implementation}: {r.reason}" for r in rows if r.op == op and r.implementation in better
        )
        lines.append(f"{op:{WIDTH}}{chosen}" + (f" ({missing})" if missing else ""))
    return lines


def running(op: str, device: str) -> str:
    """The implementation that `choose` takes."""
    return choose(op, device).__module__.rpartition(".")[2]


def installed(package: str) -> str | None:
    """The version of a distribution, None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None
