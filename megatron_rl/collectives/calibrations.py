"""`Calibrations`: measured costs of the paths, kept from run to run in one file for each topology.

Rank 0 reads and writes it, in the cache folder of the compiled operations. A run on the same nodes, links and devices
starts from them instead of measuring for seconds; `Selector` measures again when they turn out wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.collectives.cost_model import SIZES, Cost, choose
from megatron_rl.ops.extension import cache_folder

logger = logging.getLogger(__name__)

DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError)  # what `_read` raises of a file of other content
SHOWN = tuple(SIZES[0] << shift for shift in (0, 2, 4, 6, 8))  # bytes of the messages in the table

Costs = Mapping[str, Cost]  # of each path, by its name in `cost_model`


@dataclass(frozen=True)
class Calibrations:
    """The file of one topology.

    Args:
        topology: all that decides the costs, for people and as the key: nodes, links, devices, settings.
    """

    topology: str

    @property
    def path(self) -> Path:
        return _folder() / f"{hashlib.sha256(self.topology.encode()).hexdigest()[:16]}.json"

    def load(self, collective: str) -> Costs | None:
        """The costs of "all_reduce", .. that an earlier run measured; None where none did or the file is damaged."""
        if not self.path.is_file():
            return None
        try:
            return _read(self.path)[1].get(collective)
        except DAMAGE as error:
            logger.warning("%s holds no calibration (%s): measuring anew", self.path, error)
            return None

    def save(self, collective: str, costs: Costs) -> None:
        """Add or replace one collective; where that cannot be, a warning: the next run can measure."""
        try:
            known = _read(self.path)[1] if self.path.is_file() else {}
        except DAMAGE:
            known = {}
        rows = {
            name: {path: cost.samples for path, cost in each.items()}
            for name, each in (known | {collective: costs}).items()
        }
        partial = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"topology": self.topology, "seconds": rows}, indent=1))
            os.replace(partial, self.path)
        except OSError as error:
            logger.warning("the calibration of %s is not kept: %s", collective, error)


def saved_choices(minimum_gain: float = 0.1) -> Iterator[str]:
    """Lines of the table of choices of every topology that was calibrated on this machine, for `megatron-rl info`."""
    for path in sorted(_folder().glob("*.json")):
        try:
            topology, collectives = _read(path)
        except DAMAGE:
            yield f"{path} is damaged: delete it"
            continue
        yield topology
        for name, costs in sorted(collectives.items()):
            picks = (f"{size >> 20} MB {choose(costs, size, minimum_gain)}" for size in SHOWN)
            yield from (f"  {name:16}{pick}" for pick in picks)


def _folder() -> Path:
    return cache_folder() / "collectives"


def _read(path: Path) -> tuple[str, dict[str, Costs]]:
    content = json.loads(path.read_text())
    costs: dict[str, Costs] = {
        collective: {
            path: Cost(tuple((int(num_bytes), float(seconds)) for num_bytes, seconds in samples))
            for path, samples in paths.items()
        }
        for collective, paths in content["seconds"].items()
    }
    if not all(cost.samples for paths in costs.values() for cost in paths.values()):
        raise ValueError("a path without a sample")
    return str(content["topology"]), costs
