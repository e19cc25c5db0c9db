"""Which implementation of an operation runs; the files of its folder are the choices.

`megatron_rl/ops/<op>/<implementation>.py` holds a callable named `<op>`; adding the file registers it. A module that
needs more than torch also has `requires(device_type)`, which raises `UnavailableError` with the reason. `choose` takes
the best available one for a device and logs it once; a forced choice (argument, or the environment variable
MEGATRON_RL_OPS="copy_spans=reference,gae=cpu") is used or raises, and never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron_rl.ops as ops_package
from megatron_rl.registry import nearest

logger = logging.getLogger(__name__)

ENVIRONMENT = "MEGATRON_RL_OPS"
IMPLEMENTATIONS = ("cuda", "triton", "cpu", "reference")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
ANY_DEVICE = ("reference",)

_loaded: dict[tuple[str, str, str], Callable[..., Any] | UnavailableError] = {}
# (operation, device type, forced by argument, environment variable) -> what runs: nothing else may cost at each call.
_chosen: dict[tuple[str, str, str | None, str], Callable[..., Any]] = {}


class UnavailableError(RuntimeError):
    """An implementation cannot run here; the message is the reason, in one line."""


@dataclass(frozen=True)
class Availability:
    """One row of the report of `megatron-rl info`.

    Attributes:
        op: operation name.
        implementation: one of `IMPLEMENTATIONS`.
        device_type: the device it was asked for ("cpu", "cuda").
        available: whether `choose` may take it there.
        reason: why not; empty when available.
    """

    op: str
    implementation: str
    device_type: str
    available: bool
    reason: str


def operations() -> list[str]:
    """Names of all operations: the sub-packages of `megatron_rl.ops`, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(ops_package.__path__) if module.ispkg)


def implementations(op: str) -> list[str]:
    """The implementations that exist as files for ``op``, best first; whether they can run is `availability`."""
    if op not in operations():
        raise ValueError(f"unknown operation {op!r}.{nearest(op, operations())} Known: {', '.join(operations())}")
    prefix = f"{ops_package.__name__}.{op}"
    return [name for name in IMPLEMENTATIONS if importlib.util.find_spec(f"{prefix}.{name}") is not None]


def load(op: str, implementation: str, device_type: str) -> Callable[..., Any]:
    """The callable of one implementation.

    Raises:
        ValueError: no such operation or implementation.
        UnavailableError: it exists but cannot run on ``device_type`` here.
    """
    known = implementations(op)
    if implementation not in known:
        hint = nearest(implementation, known)
        raise ValueError(f"{op} has no implementation {implementation!r}.{hint} Known: {', '.join(known)}")
    key = (op, implementation, device_type)
    if key not in _loaded:
        try:
            _loaded[key] = _import(op, implementation, device_type)
        except UnavailableError as reason:
            _loaded[key] = reason
    found = _loaded[key]
    if isinstance(found, UnavailableError):
        raise found
    return found


def _import(op: str, implementation: str, device_type: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(f"{ops_package.__name__}.{op}.{implementation}")
    except ImportError as error:
        raise UnavailableError(f"import failed: {error}") from error
    requires: Callable[[str], None] | None = vars(module).get("requires")
    if requires is not None:
        requires(device_type)
    function: Callable[..., Any] = vars(module)[op]
    return function


def choose(op: str, device_type: str, implementation: str | None = None) -> Callable[..., Any]:
    """The callable that runs ``op`` on tensors of ``device_type``.

    Args:
        op: operation name, a folder of `megatron_rl.ops`.
        device_type: `tensor.device.type`.
        implementation: forces this one; None asks the environment, and then takes the best available.

    Raises:
        ValueError: unknown operation or implementation, or a malformed environment variable.
        UnavailableError: the forced implementation cannot run here, with the reason.
    """
    text = os.environ.get(ENVIRONMENT, "")
    key = (op, device_type, implementation, text)
    found = _chosen.get(key)
    if found is None:
        forced = implementation or _forced_by_environment(text).get(op)
        found = _chosen[key] = _forced(op, device_type, forced) if forced else _best(op, device_type)
    return found


def _forced(op: str, device_type: str, implementation: str) -> Callable[..., Any]:
    try:
        function = load(op, implementation, device_type)
    except UnavailableError as reason:
        raise UnavailableError(
            f"{op}={implementation} was asked for on {device_type}, but it is unavailable: {reason}. "
            f"Remove the choice (argument or {ENVIRONMENT}) to let the best available one run"
        ) from reason
    logger.info("op %s on %s: %s, as asked", op, device_type, implementation)
    return function


def _best(op: str, device_type: str) -> Callable[..., Any]:
    known = implementations(op)
    skipped: list[str] = []
    for name in PREFERENCE.get(device_type, ANY_DEVICE):
        if name not in known:
            continue
        try:
            function = load(op, name, device_type)
        except UnavailableError as reason:
            skipped.append(f"{name}: {reason}")
            continue
        logger.info("op %s on %s: %s%s", op, device_type, name, f" ({'; '.join(skipped)})" if skipped else "")
        return function
    raise UnavailableError(f"{op} has no implementation for {device_type}: {'; '.join(skipped) or ', '.join(known)}")


def _forced_by_environment(text: str) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in text.split(",") if entry.strip()]
    forced = {op.strip(): name.strip() for op, _, name in pairs}
    for op, name in forced.items():
        if not name or op not in operations():
            hint = nearest(op, operations())
            raise ValueError(f"{ENVIRONMENT}={text!r}: {op!r} is not an 'operation=implementation' pair.{hint}")
    return forced


def availability() -> list[Availability]:
    """Every implementation of every operation, whether it can run, and why not (loads them: may compile once)."""
    rows = []
    for op in operations():
        for name in implementations(op):
            for device_type, preferred in PREFERENCE.items():
                if name not in preferred:
                    continue
                try:
                    load(op, name, device_type)
                    rows.append(Availability(op, name, device_type, True, ""))
                except UnavailableError as reason:
                    rows.append(Availability(op, name, device_type, False, str(reason)))
    return rows
