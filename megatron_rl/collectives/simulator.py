"""`simulate`: what an all-reduce costs by each path on a cluster that need not exist, from the speeds of its links.

    print(simulate(load_config(ClusterConfig, "cluster.yaml")))

The paths are those between which `HybridAllReduce` chooses, plus what a second link or a bf16 wire would add. Bytes are
exact: a ring over N ranks sends ``2 (N - 1) / N`` of the message out of each rank, the hierarchical path
``2 (n - 1) / n`` out of each of n nodes (Patarasuk and Yuan, 2009; Thakur et al., 2005). Seconds are latency plus
bytes over bandwidth, the busiest link counting alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_rl.collectives.cost_model import LIBRARY, fastest, piece_bytes
from megatron_rl.collectives.pipeline import STEPS, WINDOW
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.ranges import Positive

GIGA = 1e9
MISSION = 0.37  # less communication time than the library, the figure that is asked for


class LinkConfig(ConfigRecord):
    """One direction of a link."""

    gbytes_per_s: float = Field(gt=0)
    """GB/s that it carries in practice, headers taken off."""
    latency_us: float = Field(default=5.0, ge=0)
    """Microseconds from a send to its arrival."""

    @property
    def bytes_per_s(self) -> float:
        return self.gbytes_per_s * GIGA

    @property
    def latency(self) -> float:
        return self.latency_us * 1e-6


class ClusterConfig(ConfigRecord):
    """Nodes of one kind and the links of each."""

    nodes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048), min_length=1
    )
    """Numbers of nodes to look at."""
    ranks_per_node: int = Field(default=8, ge=1)
    """Data-parallel ranks of one group on a node."""
    megabytes: tuple[Positive, ...] = Field(default=(4.0, 64.0, 1024.0), min_length=1)
    """MB (2**20 bytes) of fp32 messages; Megatron's gradient buckets are 40 million elements by default."""
    inside: LinkConfig
    """From rank to rank of a node: NVLink, PCIe or host memory."""
    between: LinkConfig
    """All network interfaces of a node that the library uses, together."""
    second: LinkConfig | None = None
    """Another network that the library leaves idle; the hierarchical path sends a share over it."""
    host_link: LinkConfig | None = None
    """From each device to host memory (PCIe); null where tensors are in host memory."""
    host_memory_gbytes_per_s: float = Field(default=200.0, gt=0)
    """GB/s at which all ranks of a node together read and write host memory."""
    chunk_us: float = Field(default=300.0, ge=0)
    """Microseconds of Python and barriers for a piece of the hierarchical path."""
    send_us: float = Field(default=10.0, ge=0)
    """Microseconds of the processor for each message to another node: a lane sends one to each."""
    library: Literal["ring", "ring_or_tree"] = "ring_or_tree"
    """Algorithms of the library: gloo has the ring, NCCL double binary trees as well."""
    rank_order: Literal["by_node", "interleaved"] = "by_node"
    """Whether neighbours of the ring are on one node wherever possible, or never."""
    chunk_mb: float = Field(default=2.0, gt=0)
    """MB of the largest pieces in which messages go through node memory (`CollectivesConfig.chunk_mb`)."""


@dataclass(frozen=True, slots=True)
class Path:
    """One way of reducing one message. Written by `simulate`."""

    name: str
    seconds: float
    node_bytes: float  # that leave the busiest node


@dataclass(frozen=True, slots=True)
class Case:
    """One message on one size of cluster."""

    nodes: int
    ranks: int
    megabytes: float
    library: Path
    others: tuple[Path, ...]

    def saving(self, path: Path) -> float:
        """Share of the library's time that ``path`` saves; below 0 it is slower."""
        return 1 - path.seconds / self.library.seconds

    def choice(self, minimum_gain: float = 0.1) -> Path:
        """What `HybridAllReduce` takes as it is configured by default: no bf16 wire, which rounds."""
        paths = {path.name: path for path in (self.library, *self.others) if "bf16" not in path.name}
        return paths[fastest({name: path.seconds for name, path in paths.items()}, minimum_gain)]


@dataclass(frozen=True, slots=True)
class Simulation:
    """All cases of a cluster; ``str()`` is a table, `to_json` plain data."""

    cluster: ClusterConfig
    cases: tuple[Case, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "nodes": case.nodes,
                "ranks": case.ranks,
                "megabytes": case.megabytes,
                "library": asdict(case.library),
                "paths": [asdict(path) | {"saving": case.saving(path)} for path in case.others],
                "choice": case.choice().name,
            }
            for case in self.cases
        ]
        return {"cases": rows, "second_link_for_37_percent": list(map(list, self.needed_second_links()))}

    def needed_second_links(self) -> Iterator[tuple[int, float]]:
        """(nodes, rate of a second link over the first) from which on 37 % less time is possible at all."""
        for nodes in sorted({case.nodes for case in self.cases}):
            yield nodes, needed_second_link(nodes, self.cluster.ranks_per_node, MISSION)

    def __str__(self) -> str:
        names = [path.name for path in self.cases[0].others]
        head = f"{'nodes':>6} {'ranks':>6} {'MB':>6} {'library':>11}" + "".join(f" {name:>26}" for name in names)
        lines = [head + "  choice"]
        for case in self.cases:
            cells = "".join(_cell(path, case.saving(path)) for path in case.others)
            sizes = f"{case.nodes:>6} {case.ranks:>6} {case.megabytes:>6g} {case.library.seconds * 1e3:>8.2f} ms"
            lines.append(f"{sizes}{cells}  {case.choice().name}")
        lines += ["", f"* at least {MISSION:.0%} less time than the library. What links alone allow at most:"]
        for nodes, rate in self.needed_second_links():
            ranks = nodes * self.cluster.ranks_per_node
            alone = "by the hierarchy alone" if rate == 0 else f"with a second link of {rate:.2f} of the first"
            lines.append(
                f"  {nodes} nodes ({ranks} ranks): hierarchy {_signed(_hierarchy(nodes, ranks))}; {MISSION:.0%} {alone}"
            )
        return "\n".join(lines)


def simulate(cluster: ClusterConfig) -> Simulation:
    """Every message of ``cluster`` on every number of nodes.

    Raises:
        ConfigError: a cluster of one rank, which has nothing to reduce.
    """
    if min(cluster.nodes) * cluster.ranks_per_node == 1:
        raise ConfigError("nodes=1 with ranks_per_node=1 is one rank, which has nothing to reduce: raise one of them")
    cases = []
    for nodes in cluster.nodes:
        for megabytes in cluster.megabytes:
            num_bytes = megabytes * 2**20
            others = [hierarchical(cluster, nodes, num_bytes)]
            if cluster.second is not None:
                others.append(hierarchical(cluster, nodes, num_bytes, second=True))
            others.append(hierarchical(cluster, nodes, num_bytes, bf16_wire=True))
            ranks = nodes * cluster.ranks_per_node
            cases.append(Case(nodes, ranks, megabytes, library(cluster, nodes, num_bytes), tuple(others)))
    return Simulation(cluster, tuple(cases))


def library(cluster: ClusterConfig, nodes: int, num_bytes: float) -> Path:
    """The library's all-reduce of ``num_bytes``: a ring over all ranks, or double binary trees where they are faster.

    A ring has ``2 (N - 1)`` steps of a part each; in node order one of a node's hops crosses the network, interleaved
    all do. Double binary trees (Sanders, Speck and Traff, 2009) go up and down once, in pieces: a node that is inner in
    one tree and a leaf in the other sends half the message up in each and half of it down to each of two children.
    """
    size = nodes * cluster.ranks_per_node
    if size == 1:
        return Path(LIBRARY, 0.0, 0.0)
    sent = 2 * (size - 1) / size * num_bytes
    crossing = 0.0 if nodes == 1 else cluster.ranks_per_node if cluster.rank_order == "interleaved" else 1
    hop = max(cluster.inside.latency, cluster.between.latency if nodes > 1 else 0.0)
    rate_limits = [crossing * sent / cluster.between.bytes_per_s]
    if cluster.ranks_per_node > 1 and crossing != cluster.ranks_per_node:
        rate_limits.append(sent / cluster.inside.bytes_per_s)
    ring = Path(LIBRARY, 2 * (size - 1) * hop + max(rate_limits), crossing * sent)
    if cluster.library == "ring" or nodes == 1:
        return ring
    depth = math.ceil(math.log2(nodes)) * cluster.between.latency
    depth += (cluster.ranks_per_node - 1) * cluster.inside.latency
    tree_bytes = min(2.0, nodes / 2) * num_bytes  # two nodes are roots of a tree each
    slowest = max(tree_bytes / cluster.between.bytes_per_s, tree_bytes / cluster.inside.bytes_per_s)
    return min(ring, Path(LIBRARY, 2 * depth + slowest, tree_bytes), key=lambda path: path.seconds)


def hierarchical(
    cluster: ClusterConfig, nodes: int, num_bytes: float, *, second: bool = False, bf16_wire: bool = False
) -> Path:
    """`HierarchicalPath`, whose pieces are written, summed, sent and read beside one another.

    Host work: copies between device and host, every rank writes its part and reads the result, sums read each rank's
    part once, and a turn of the pipeline for each piece. What the slower of network and host leaves over is hidden but
    for one piece. A window begins with an announcement, ends with the last piece's turns, and nodes vote on it.
    """
    name = "hierarchical" + (" + second link" if second else "") + (" + bf16 wire" if bf16_wire else "")
    ranks, memory = cluster.ranks_per_node, cluster.host_memory_gbytes_per_s * GIGA
    pieces = math.ceil(num_bytes / piece_bytes(num_bytes, int(cluster.chunk_mb * 2**20)))
    windows = math.ceil(pieces / WINDOW)
    turn = (cluster.chunk_us + 2 * (nodes - 1) * cluster.send_us) * 1e-6
    touched = (2 * ranks + ranks + 1 + 2 * ranks) * num_bytes  # write (read, write), sum, read back (read, write)
    host = touched / memory + pieces * turn
    if cluster.host_link is not None:
        host += 2 * num_bytes / cluster.host_link.bytes_per_s
    sent = 2 * (nodes - 1) / nodes * num_bytes * (0.5 if bf16_wire else 1.0)
    rate = cluster.between.bytes_per_s + (cluster.second.bytes_per_s if second and cluster.second else 0.0)
    network = sent / rate
    waiting = STEPS * turn
    if nodes > 1:
        links = [cluster.between] + ([cluster.second] if second and cluster.second else [])
        rounds = 3 + math.ceil(math.log2(nodes))  # announcement, parts, sums; the vote
        waiting += rounds * max(link.latency for link in links)
    return Path(name, max(network, host) + min(network, host) / pieces + windows * waiting, sent)


def needed_second_link(nodes: int, ranks_per_node: int, saving: float) -> float:
    """Rate of a second link over the first at which the hierarchical path saves ``saving``, by bytes alone; 0 = none.

    At 8 x 8 ranks: 2 (63/64) (1 - 0.37) = 2 (7/8) / (1 + rate), so rate = 0.41.
    """
    size = nodes * ranks_per_node
    ring, exchange = (size - 1) / size, (nodes - 1) / nodes
    return max(0.0, exchange / (ring * (1 - saving)) - 1) if size > 1 else 0.0


def _hierarchy(nodes: int, ranks: int) -> float:
    return 1 - ((nodes - 1) / nodes) / ((ranks - 1) / ranks) if ranks > 1 else 0.0


def _cell(path: Path, saving: float) -> str:
    """One path in a column of 27 characters."""
    return f" {path.seconds * 1e3:>14.2f} ms {_signed(saving):>6}{' *' if saving >= MISSION else '  '}"


def _signed(share: float) -> str:
    return f"{-share:+.0%}"
