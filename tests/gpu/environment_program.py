"""Versions and the device of the environment that `tools/gpu_report.py` made; one JSON object on the last line."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch


def found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvcc() -> str | None:
    path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        return None
    out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    return next((line.strip() for line in out.splitlines() if "release" in line), out.strip()[:100])


def main() -> None:
    packages = ("torch", "triton", "transformers", "megatron-core", "numpy", "pydantic")
    machine: dict[str, object] = {name: found(name) for name in packages}
    machine |= {"python": platform.python_version(), "cuda": torch.version.cuda, "nvcc": nvcc(), "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["compute_capability"] = f"{properties.major}.{properties.minor}"
        torch.ones(1, device="cuda").add_(1).item()  # a driver that is too old says so here
    print(json.dumps(machine))


if __name__ == "__main__":
    main()
