"""Megatron-LM's arguments in a checkpoint: changed, or taken out, as another program's checkpoint has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def change_common(iteration: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` edit what a checkpoint's iteration stores beside tensors, in place."""
    common = torch.load(iteration / "common.pt", weights_only=False)
    change(common)
    torch.save(common, iteration / "common.pt")


def forget_arguments(iteration: Path) -> None:
    """Make it a checkpoint that does not say what model it holds."""
    change_common(iteration, lambda common: common.pop("args"))
