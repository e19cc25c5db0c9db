"""Two ranks of one rollout replica: what becomes of a generation on the first is known on both."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rl.parallel.agreement import PeerError
from megatron_rl.reshard import Layout
from megatron_rl.rollout.base import ServersLostError
from megatron_rl.rollout.sglang.replica import Replica


def generate(replica: Replica, failure: Exception | None = None, num_rewrites: int = 0) -> str:
    """How generation ended here: the error's type and text, or the number of rewrites."""
    try:
        if replica.leads:
            with replica.calling():
                replica.heartbeat(0.0)
                for _ in range(num_rewrites):
                    replica.call("rewrite")
                if failure is not None:
                    raise failure
            return f"{num_rewrites} rewrites"
        return f"{sum(1 for _ in replica.rewrites())} rewrites"
    except (PeerError, ServersLostError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    layout = Layout("by hand", {0: 0, 1: 1}, lambda replica: [])
    replica = Replica.of(layout, rank, dist.group.WORLD)
    assert replica.ranks == (0, 1)
    assert replica.leads == (rank == 0)
    assert generate(replica, num_rewrites=2) == "2 rewrites"
    said = generate(replica, ValueError("a server refused prompt 7"))
    assert said == ("ValueError: a server refused prompt 7", said)[rank]
    assert "generation failed on rank 0: ValueError: a server refused prompt 7" in said or rank == 0, said
    said = generate(replica, ServersLostError("no server holds the weights", {}))
    assert said.startswith("ServersLostError"), said
    assert generate(replica) == "0 rewrites"
    print(f"rank {rank} knows", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
