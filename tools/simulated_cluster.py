"""A cluster on one machine: nodes are network namespaces, their links are shaped to a rate. Needs root and iproute2.

    with Cluster(nodes=2, links={"eth0": "200mbit"}) as cluster:
        processes = cluster.start(["python", "program.py"], ranks_per_node=2)

Ranks get torchrun's variables and GLOO_SOCKET_IFNAME. Names are of this process, so several clusters can stand beside
one another; leaving the block ends the processes and removes the namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PORT = 29511


def why_not() -> str:
    """Why no cluster can be made here; "" where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    probe = f"mrl{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Cluster:
    """Args:
    nodes: number of nodes.
    links: network interface -> rate as tc writes it ("200mbit"), or "" for no limit; the first is the default one.
    """

    def __init__(self, nodes: int, links: Mapping[str, str]) -> None:
        self.nodes, self.links = nodes, dict(links)
        self._prefix = f"mrl{os.getpid()}"
        self._processes: list[subprocess.Popen[str]] = []

    def namespace(self, node: int) -> str:
        return f"{self._prefix}n{node}"

    def __enter__(self) -> Cluster:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._remove()

    def start(
        self, command: Sequence[str], ranks_per_node: int, *, interleaved: bool = False, **environment: str
    ) -> list[subprocess.Popen[str]]:
        """One process a rank, in rank order; standard output and error are piped.

        Args:
            interleaved: rank r runs on node ``r % nodes`` instead of ``r // ranks_per_node``.
        """
        size = self.nodes * ranks_per_node
        for rank in range(size):
            node = rank % self.nodes if interleaved else rank // ranks_per_node
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank // self.nodes if interleaved else rank % ranks_per_node),
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": next(iter(self.links)),
                "OMP_NUM_THREADS": "1",
            }
            self._processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", self.namespace(node), *command],
                    env=os.environ | variables | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return self._processes[-size:]

    def shape(self, node: int, link: str, rate: str) -> None:
        """Change the rate of one node's link, both ways, while programs run."""
        index = list(self.links).index(link)
        self._run(f"tc -n {self.namespace(node)} qdisc replace dev {link} root {_bucket(rate)}")
        self._run(f"tc -n {self._bridge} qdisc replace dev p{node}l{index} root {_bucket(rate)}")

    def cut(self, node: int, link: str) -> None:
        """Take one node's link down for good: packets vanish, connections stall."""
        index = list(self.links).index(link)
        self._run(f"ip -n {self._bridge} link set p{node}l{index} down")

    @property
    def _bridge(self) -> str:
        return f"{self._prefix}br"

    def _make(self) -> None:
        self._run(f"ip netns add {self._bridge}", f"ip -n {self._bridge} link set lo up")
        for index in range(len(self.links)):
            self._run(
                f"ip -n {self._bridge} link add b{index} type bridge", f"ip -n {self._bridge} link set b{index} up"
            )
        for node in range(self.nodes):
            name = self.namespace(node)
            self._run(f"ip netns add {name}", f"ip -n {name} link set lo up")
            for index, (link, rate) in enumerate(self.links.items()):
                port = f"p{node}l{index}"
                self._run(
                    f"ip link add {port} netns {self._bridge} type veth peer name {link} netns {name}",
                    f"ip -n {name} addr add 10.{77 + index}.0.{node + 1}/24 dev {link}",
                    f"ip -n {name} link set {link} up",
                    f"ip -n {self._bridge} link set {port} master b{index} up",
                )
                if rate:
                    self.shape(node, link, rate)

    def _remove(self) -> None:
        for name in (*map(self.namespace, range(self.nodes)), self._bridge):
            if Path(f"/run/netns/{name}").exists():
                self._run(f"ip netns del {name}")

    def _run(self, *commands: str) -> None:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=30)
            if done.returncode:
                raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _bucket(rate: str) -> str:
    return f"tbf rate {rate} burst 64kb latency 300ms"
