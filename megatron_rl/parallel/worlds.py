"""`SplitWorld`: training ranks and rollout ranks as two worlds of one torchrun job, and the bridge between them.

    rank   0 .. T-1     training: default process group of its own, Megatron-Core knows no other ranks
    rank   T .. T+K-1   rollout:  the same

So whatever asks torch.distributed for its world sees one half only. The bridge joins all ranks, numbered as torchrun
numbers them, by two groups: one carries weights, one carries Python objects (`parallel.messages`), so that neither
waits for the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_rl.config import ConfigError
from megatron_rl.devices import Platform
from megatron_rl.parallel.grid import ParallelSizes, RankGrid
from megatron_rl.parallel.groups import group_beside
from megatron_rl.parallel.messages import Messages

WAIT_SECONDS = 6 * 3600.0  # that one half waits for the other; a rank that died is noticed when its connections close


@dataclass(frozen=True, eq=False)
class SplitWorld:
    """The two halves, seen from one rank."""

    rank: int  # torchrun's, which the bridge uses
    training: RankGrid  # the training ranks' places
    num_rollout: int
    store: dist.Store  # of all ranks
    weights_group: dist.ProcessGroup  # all ranks
    messages: Messages  # between all ranks

    @classmethod
    def join(cls, platform: Platform, sizes: ParallelSizes, timeout: float) -> SplitWorld:
        """Make this rank's half its default process group, and the bridge. Collective over all ranks of torchrun.

        Args:
            sizes: of training, with ``rollout_ranks``.

        Raises:
            ConfigError: the process has a default group already, or the sizes do not fit the ranks.
        """
        if dist.is_initialized():
            raise ConfigError(
                f"parallel.rollout_ranks={sizes.rollout_ranks} splits the job before torch.distributed is initialised, "
                "but it already is: leave init_process_group to megatron_rl, or set rollout_ranks=0"
            )
        store, rank, world_size = platform.rendezvous(timeout)
        num_training = sizes.num_training(world_size)
        grid = RankGrid(sizes, num_training)
        name, start, size = "training", 0, num_training
        if rank >= num_training:
            name, start, size = ("rollout", num_training, sizes.rollout_ranks)
        platform.init_world(dist.PrefixStore(name, store), rank - start, size, timeout)
        weights, messages = (
            group_beside(f"bridge {purpose}", backend, store, rank, world_size, WAIT_SECONDS)
            for purpose, backend in (("weights", platform.backend), ("messages", platform.host_backend))
        )
        return cls(rank, grid, sizes.rollout_ranks, store, weights, Messages(messages, WAIT_SECONDS))

    @property
    def num_training(self) -> int:
        return self.training.world_size

    @property
    def world_size(self) -> int:
        """All ranks that torchrun started."""
        return self.num_training + self.num_rollout

    @property
    def on_rollout(self) -> bool:
        """Whether this is a rollout rank."""
        return self.rank >= self.num_training

    @property
    def training_ranks(self) -> range:
        return range(self.num_training)

    @property
    def rollout_ranks(self) -> range:
        return range(self.num_training, self.num_training + self.num_rollout)

    def sender(self, training_rank: int) -> int:
        """The rollout rank whose messages this training rank gets: each serves as many training ranks."""
        return self.num_training + training_rank % self.num_rollout

    def receivers(self, rollout_rank: int) -> list[int]:
        """The training ranks that get the messages of this rollout rank."""
        return [rank for rank in self.training_ranks if self.sender(rank) == rollout_rank]
