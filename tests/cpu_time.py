"""What a test run cost: CPU time of all processes that tests start, by module, printed before pytest's last line.

Each worker of pytest-xdist measures itself and its children; the process that prints adds them up. Children count when
they have ended and were waited for; the warm processes of `forked.py` and `integration/warm_sglang.py` count with each
program or server that they ran.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import forked
import pytest
from integration import warm_sglang

SHOWN = 30  # modules; of those that cost at least a second


def seconds() -> float:
    """CPU seconds of this process, of the children that it has waited for, and of its warm processes."""
    return sum(os.times()[:4]) + forked.cpu_seconds() + warm_sglang.cpu_seconds()


class CpuTime:
    """Collects on each worker, and prints where the summary is printed."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.modules: Counter[str] = Counter()
        self.workers = 0.0  # seconds of workers that have ended

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = seconds()
        try:
            return (yield)
        finally:
            self.modules[item.nodeid.split("::")[0]] += seconds() - before

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        forked.close()
        warm_sglang.close()
        output = getattr(self.config, "workeroutput", None)
        if output is not None:  # a worker: xdist carries this to the process that prints
            output["cpu_seconds"] = {"total": seconds(), "modules": dict(self.modules)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        found = getattr(node, "workeroutput", {}).get("cpu_seconds", {"total": 0.0, "modules": {}})
        self.workers += found["total"]
        self.modules.update(found["modules"])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        # With workers, what the system counts as this process's children are those workers once more.
        total = sum(os.times()[:2]) + self.workers if self.workers else seconds()
        rest = total - sum(self.modules.values())
        line = f"CPU time: {total / 60:.1f} minutes, {rest / 60:.1f} of them to import and to collect"
        terminalreporter.write_line(line)
        for module, spent in self.modules.most_common(SHOWN):
            if spent >= 1:
                terminalreporter.write_line(f"{spent:8.1f} s  {module}")
