"""Comparison of the measurements on two layouts, in the order in which an update computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FIELD_TOLERANCE = 1e-4  # relative to 1 + |value|, as single precision over a few layers allows
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # of a tensor's largest entry: it is a difference of weights
METRIC_TOLERANCE = 5e-4

STEPS = ("fields", "loss", "gradient", "metrics")  # columns of the report, in order


@dataclass(frozen=True)
class Measured:
    """One variant's results."""

    fields: Mapping[str, list[tuple[int, Tensor]]]  # (data-parallel rank, what it holds), of every rank in order
    metrics: Mapping[str, float]  # over all ranks
    gradients: Mapping[str, Tensor]  # by role and logical tensor: change of the weights

    def copies(self, name: str) -> list[Tensor]:
        """The field over all data-parallel ranks, one copy for each rank of a model replica."""
        replicas: dict[int, list[Tensor]] = {}
        for dp, value in self.fields[name]:
            replicas.setdefault(dp, []).append(value)
        return [torch.cat(parts) for parts in zip(*(replicas[dp] for dp in sorted(replicas)), strict=True)]


@dataclass(frozen=True, slots=True)
class Difference:
    """A quantity that differs from its value in one process."""

    step: str  # one of STEPS
    quantity: str
    detail: str

    def __str__(self) -> str:
        return f"{self.quantity} ({self.detail})"


def differences(base: Measured, other: Measured) -> Iterator[Difference]:
    """What differs, in the order of computation: fields as stages write them, loss, gradient, metrics."""
    for name in base.fields:
        yield from _field(name, base, other)
    losses = [name for name in base.metrics if name == "loss/total"] + [
        name for name in base.metrics if name.startswith("loss/") and name != "loss/total"
    ]
    for name in losses:
        yield from _number("loss", name, base.metrics, other.metrics, LOSS_TOLERANCE)
    for name, gradient in base.gradients.items():
        yield from _gradient(name, gradient, other.gradients)
    for name in sorted({*base.metrics, *other.metrics} - set(losses)):
        yield from _number("metrics", name, base.metrics, other.metrics, METRIC_TOLERANCE)


def _field(name: str, base: Measured, other: Measured) -> Iterator[Difference]:
    expected = base.copies(name)[0]
    if name not in other.fields:
        yield Difference("fields", name, "not written")
        return
    for number, found in enumerate(other.copies(name)):
        place = f", on rank {number} of each replica" if number else ""
        if found.shape != expected.shape:
            yield Difference("fields", name, f"{found.numel()} numbers instead of {expected.numel()}{place}")
            return
        error = (found.double() - expected.double()).abs() / (1 + expected.double().abs())
        if not bool((error <= FIELD_TOLERANCE).all()):
            worst = int(error.nan_to_num(nan=math.inf).argmax())
            values = f"{found[worst].item():.6g} instead of {expected[worst].item():.6g} at position {worst}"
            yield Difference("fields", name, values + place)
            return


def _number(
    step: str, name: str, base: Mapping[str, float], other: Mapping[str, float], tolerance: float
) -> Iterator[Difference]:
    if name not in other or name not in base:
        yield Difference(step, name, "not reported by " + ("this layout" if name in base else "one process"))
        return
    found, expected = other[name], base[name]
    if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=0.1 * tolerance):
        yield Difference(step, name, f"{found:.6g} instead of {expected:.6g}")


def _gradient(name: str, expected: Tensor, other: Mapping[str, Tensor]) -> Iterator[Difference]:
    found = other[name]
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max())
    if not error <= GRADIENT_TOLERANCE * scale + 1e-7:
        ratio = float((found * expected).sum() / expected.square().sum()) if scale else math.inf
        detail = f"off by {error / scale if scale else math.inf:.2g} of its largest entry, about {ratio:.3g} times it"
        yield Difference("gradient", f"gradient of {name}", detail)
