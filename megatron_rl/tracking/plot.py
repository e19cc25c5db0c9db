"""`plot_reward_curve`: the training reward, raw and smoothed, and the evaluations, as a PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

SMOOTHING = 0.9  # weight of the past in the moving average


def plot_reward_curve(
    metrics: Mapping[int, Mapping[str, float]],
    path: Path,
    train: str = "reward*/mean",
    evaluation: str = "eval/*reward*",
    title: str = "Reward",
    ylabel: str = "reward",
) -> None:
    """Draw one training metric against the step, raw and smoothed, with one evaluation metric as points.

    Args:
        metrics: metrics by step, as `read_metrics` returns them.
        train, evaluation: names, or patterns whose first match is drawn (* matches anything).
        path: the PNG to write.

    Raises:
        ValueError: neither metric occurs; the message lists those that do.
    """
    import matplotlib.figure  # half a second, and needed by rank 0 only at the end of a run

    names = dict.fromkeys(name for values in metrics.values() for name in values)
    train, evaluation = _first(names, train), _first(names, evaluation)
    curve = {step: values[train] for step, values in metrics.items() if train in values}
    points = {step: values[evaluation] for step, values in metrics.items() if evaluation in values}
    if not curve and not points:
        known = ", ".join(sorted(names)) or "nothing"
        raise ValueError(f"nothing to draw: neither {train!r} nor {evaluation!r} is among {known}")
    # A Figure without pyplot draws with Agg and keeps no global state. Fixed margins: a computed layout draws it twice.
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120)
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.12, top=0.92)
    axes = figure.add_subplot()
    if curve:
        steps, values = list(curve), list(curve.values())
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1, label=f"{train} (raw)")
        axes.plot(steps, smooth(values), color="tab:blue", linewidth=2, label=f"{train} (smoothed)")
    if points:
        axes.plot(list(points), list(points.values()), "o-", color="tab:orange", markersize=5, label=evaluation)
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _first(names: Iterable[str], pattern: str) -> str:
    return next((name for name in names if fnmatchcase(name, pattern)), pattern)


def smooth(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average with the bias of its start removed (Adam, arXiv:1412.6980, section 3)."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
