"""The one place that knows CPU from GPU: `Platform`, and the CPU face of Megatron-Core.

`Platform` is loaded on first use, because it imports torch and `import megatron_rl` must stay cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.devices.cpu_face import install_cpu_face

if TYPE_CHECKING:
    from megatron_rl.devices.hardware import Platform, RngState, current_platform, use_transformer_engine

__all__ = ["Platform", "RngState", "current_platform", "install_cpu_face", "use_transformer_engine"]


def __getattr__(name: str) -> object:
    if name in ("Platform", "RngState", "current_platform", "use_transformer_engine"):
        from megatron_rl.devices import hardware

        return getattr(hardware, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
