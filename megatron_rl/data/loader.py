"""`GlobalBatchLoader`: which records make up each step's global batch, and this rank's part of it.

The order of an epoch is a pure function of (seed, epoch), the same on every rank; a step takes the next ``batch_size``
records of it, and a rank takes its contiguous part. So the global batch depends on neither the number of data-parallel
ranks nor on where a run was interrupted, and the whole state is one number: records consumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from megatron_rl.batch import Batch, Prompt
from megatron_rl.config import ConfigError
from megatron_rl.data.dataset import TokenisedDataset
from megatron_rl.data.records import DataError

if TYPE_CHECKING:
    from megatron_rl.parallel import ParallelContext

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Indexed(Protocol[T_co]):
    """A fixed list of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


class HasContext(Protocol):
    """A model's role."""

    @property
    def context(self) -> ParallelContext: ...


def epoch_order(num_items: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order of one epoch: a permutation of ``range(num_items)``, independent of every global random state."""
    order = list(range(num_items))
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class GlobalBatchLoader(Generic[T]):
    """Endless: a batch that reaches the end of an epoch continues with the next one, so all batches are full.

    Args:
        batch_size: records of a global batch, over all data-parallel ranks.
        replica: the actor, or its `ParallelContext`: its data-parallel coordinate selects this rank's part. None: one
            process takes all.

    Raises:
        ConfigError: ``replica`` is something else, or ``batch_size`` is not a positive multiple of the data-parallel
            size.
    """

    def __init__(
        self,
        dataset: Indexed[T],
        batch_size: int,
        replica: ParallelContext | HasContext | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        context: Any = getattr(replica, "context", replica)
        if context is not None and not hasattr(context, "coordinates"):
            raise ConfigError(f"replica={replica!r} has no data-parallel coordinate: pass the actor, or its context")
        dp_rank, dp_size = (context.coordinates.dp, context.dp_size) if context is not None else (0, 1)
        if batch_size < 1 or batch_size % dp_size:
            raise ConfigError(
                f"batch_size={batch_size} records cannot be divided evenly among {dp_size} data-parallel ranks: use a "
                f"multiple of {dp_size}"
            )
        if not len(dataset):
            raise DataError("no data: the data set has no records")
        self.dataset = dataset
        self.batch_size = batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed, self.shuffle = seed, shuffle
        self.num_consumed = 0  # records taken by all ranks together since the start of the run
        self._cached_order: tuple[int, Sequence[int]] = (-1, ())  # (epoch, its order)

    @property
    def epoch(self) -> float:
        """Passes over the data made so far, as a fraction."""
        return self.num_consumed / len(self.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take every record at least once; the last one borrows from the next epoch to be full."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        """This rank's part of the next global batch, ``batch_size / dp_size`` records."""
        share = self.batch_size // self.dp_size
        first = self.num_consumed + self.dp_rank * share
        self.num_consumed += self.batch_size
        return [self.dataset[self._index(position)] for position in range(first, first + share)]

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what it is valid for; the same on every rank."""
        return {
            "num_consumed": self.num_consumed,
            "num_items": len(self.dataset),
            "seed": self.seed,
            "shuffle": self.shuffle,
            **self._data,
        }

    @property
    def _data(self) -> dict[str, str]:
        """What the records are: their digest, and where they came from. Empty for records of the caller's own kind."""
        dataset = self.dataset
        return {"data": dataset.name, "digest": dataset.digest} if isinstance(dataset, TokenisedDataset) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, on any number of ranks and with any batch size.

        Raises:
            ConfigError: the data, the seed or the shuffling is another, so that the order would be, too.
        """
        mine = self.state_dict()
        for key in ("num_items", "seed", "shuffle"):
            if state[key] != mine[key]:
                raise ConfigError(
                    f"the checkpoint's data cursor was taken with {key}={state[key]}, this run has {key}={mine[key]}: "
                    "resume with the same data and seed, or start anew"
                )
        if state.get("digest", mine.get("digest")) != mine.get("digest"):  # checkpoints of older versions have none
            raise ConfigError(
                f"the checkpoint was taken on {state['data']} (digest {state['digest']}), this run has "
                f"{mine.get('data', 'other records')} (digest {mine.get('digest', 'unknown')}): as many records, but "
                "others, so going on in their middle makes no sense. Resume with the same data, template and "
                "tokenizer; to train the checkpoint's weights on other data start a new run with model=CHECKPOINT"
            )
        self.num_consumed = int(state["num_consumed"])

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if self._cached_order[0] != epoch:
            self._cached_order = (epoch, epoch_order(len(self.dataset), self.seed, epoch, self.shuffle))
        return self._cached_order[1][place]


class PromptLoader(GlobalBatchLoader[Prompt]):
    """Prompts for the training loop."""

    def next_batch(self) -> Batch:
        """A batch with this rank's next prompts and nothing else."""
        return Batch(prompts=next(self), share=(self.dp_rank, self.dp_size))
