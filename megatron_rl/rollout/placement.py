"""Which ranks form a rollout replica, and which replica answers which prompt: plain functions of rank lists.

The ranks of one training replica (all tensor, pipeline and context ranks of one data-parallel coordinate) see the same
prompts. For generation they are cut into rollout replicas of ``tp`` neighbouring ranks, and each replica takes its
share of the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config import ConfigError


@dataclass(frozen=True, slots=True)
class RolloutPlacement:
    """The rollout replicas inside one training replica.

    Args:
        ranks: global ranks of the training replica, in any order that all of them agree on.
        tp: rollout tensor-parallel ranks per replica.

    Raises:
        ConfigError: ``tp`` does not divide the ranks.
    """

    ranks: tuple[int, ...]
    tp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or len(self.ranks) % self.tp:
            raise ConfigError(
                f"rollout tp={self.tp} does not divide the {len(self.ranks)} ranks that hold one training replica: "
                f"choose a divisor of {len(self.ranks)}"
            )

    @property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """Global ranks of each rollout replica; the position inside is the rollout tp rank."""
        return tuple(self.ranks[start : start + self.tp] for start in range(0, len(self.ranks), self.tp))

    def replica(self, rank: int) -> int:
        """Index of the replica that global ``rank`` belongs to."""
        return self.ranks.index(rank) // self.tp

    def tp_rank(self, rank: int) -> int:
        """Rollout tensor-parallel rank of global ``rank``."""
        return self.ranks.index(rank) % self.tp

    def share(self, count: int, replica: int) -> range:
        """Indices of the ``count`` prompts that ``replica`` answers: every n-th one, so that prompts that lie
        together (and are alike in length) are spread, and shares differ by one prompt at most."""
        return range(replica, count, len(self.ranks) // self.tp)
