"""Import hook of the CPU face: finds Megatron-Core's modules and loads them rewritten.

The shared ``.pyc`` files stay out of it: a rewritten module is compiled from its source in every process, and a module
without anything to rewrite or patch is left to Python's own loader.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType

from megatron_rl.devices.cpu_face.patches import PATCHES
from megatron_rl.devices.cpu_face.rewrite import STAND_IN, WORDS, rewritten

PACKAGE = "megatron.core"
# Megatron-Core's warnings about GPU packages, from several modules on every rank: they do not matter on CPU.
EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
    "Transformer Engine and Apex are not installed. Falling back to local implementations of "
    "multi_tensor_applier and multi_tensor_scale",
    "Transformer Engine and Apex are not installed. Falling back to local implementations of "
    "multi_tensor_applier, multi_tensor_l2norm, and multi_tensor_scale",
    "Apex is not installed. Falling back to Torch Norm",
    "When using sequence parallelism it is recommended to set the environment variable "
    "CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup",
    "When using async grad allreduce it is recommended to set the environment variable "
    "CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup",
    "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.",  # 0.16
    "full scope is deprecated. Use empty cuda_graph_modules to capture the whole layer.",  # 0.19
)


def install_cpu_face() -> bool:
    """Let Megatron-Core run on CPU; call it before ``megatron.core`` is imported. Calling it again changes nothing.

    Where torch is not yet imported, whether an accelerator is visible is asked when ``megatron.core`` is first
    imported, so that installing stays cheap.

    Returns:
        False where an accelerator is visible: nothing was done.

    Raises:
        RuntimeError: no accelerator is visible and ``megatron.core`` is already imported.
    """
    if any(isinstance(finder, CpuFaceFinder) for finder in sys.meta_path):
        return True
    if "torch" in sys.modules and accelerator_visible():
        return False
    late = sorted(name for name in sys.modules if _is_ours(name))
    if late:
        raise RuntimeError(
            f"{late[0]} was imported before megatron_rl, and this machine shows no accelerator, so Megatron-Core must "
            f"be adapted to CPU while it is imported: write `import megatron_rl` above the first `import {PACKAGE}`"
        )
    sys.meta_path.insert(0, CpuFaceFinder())
    return True


def accelerator_visible() -> bool:
    """True where torch sees a device Megatron-Core can train on; Apple's is none."""
    import torch  # here, not above: `import megatron_rl` must not pay for torch

    if torch.cuda.is_available():
        return True
    other = torch.accelerator.current_accelerator(check_available=True)
    return other is not None and other.type != "mps"


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")


class CpuFaceLoader(importlib.machinery.SourceFileLoader):
    """Loads one module from its source, rewritten, then patched."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return rewritten(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        from megatron_rl.devices.cpu_face import torch_cuda  # here, not above: it imports torch

        module.__dict__[STAND_IN] = torch_cuda
        super().exec_module(module)
        for patch in PATCHES:
            if patch.module == module.__name__:
                patch.apply(module)


class CpuFaceFinder(importlib.abc.MetaPathFinder):
    """First on ``sys.meta_path``; answers for Megatron-Core's modules only, and leaves if it is not needed."""

    def __init__(self) -> None:
        self._decided = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_ours(fullname):
            return None
        if not self._decided:
            if accelerator_visible():
                sys.meta_path.remove(self)
                return None
            self._decided = True
            for message in EXPECTED_WARNINGS:  # append: the user's own filters keep their precedence
                warnings.filterwarnings("ignore", re.escape(message) + "$", UserWarning, append=True)
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader) and _concerns(spec.loader):
            spec.loader = CpuFaceLoader(spec.loader.name, spec.loader.path)
            spec.cached = None
        return spec


def _concerns(loader: importlib.machinery.SourceFileLoader) -> bool:
    if any(patch.module == loader.name for patch in PATCHES):
        return True
    source = loader.get_data(loader.path)
    return any(word.encode() in source for word in WORDS)
