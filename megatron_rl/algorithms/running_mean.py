"""The mean of a metric over all steps so far."""

from __future__ import annotations

from collections.abc import Mapping


class RunningMean:
    """0 before the first update; every step counts the same, whatever the size of its batch."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def update(self, measured: float) -> None:
        self.count += 1
        self.value += (measured - self.value) / self.count

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "count": float(self.count)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self.count = float(state["value"]), int(state["count"])
