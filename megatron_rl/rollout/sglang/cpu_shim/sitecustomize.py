"""Loaded by Python itself in the processes of an SGLang server on a machine without a GPU: this folder is on their
PYTHONPATH, with `sgl_kernel` beside this file. Two modules are adapted while they are imported, and nothing else.

torchvision from PyPI is built for CUDA, so that its operators do not load here: those it registers at import are
declared first. SGLang pins host memory through the CUDA runtime where it records routed experts: there is none here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST_POOL = "sglang.srt.mem_cache.pool_host.common"
_KEPT: list[object] = []  # a torch library takes its operators along when it is collected


def declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def pin_nothing(module: ModuleType) -> None:
    module.__dict__["_cuda_host_register"] = lambda *arguments, **options: None


class Adapter(MetaPathFinder):
    """Runs ``before`` ahead of, or ``after`` behind, the first import of ``name``."""

    def __init__(
        self, name: str, before: Callable[[], None] | None = None, after: Callable[[ModuleType], None] | None = None
    ) -> None:
        self.name, self.before, self.after = name, before, after

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        if self.before is not None:
            self.before()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None and self.after is not None:
            run, after = spec.loader.exec_module, self.after

            def run_and_adapt(module: ModuleType) -> None:
                run(module)
                after(module)

            spec.loader.exec_module = run_and_adapt  # type: ignore[method-assign]
        return spec


sys.meta_path[:0] = [
    Adapter("torchvision", before=declare_torchvision_operators),
    Adapter(HOST_POOL, after=pin_nothing),
]
