"""`Tickets`: the prompts of a batch, taken part by part by whichever rollout replica is free.

A replica that has finished its part takes the next number from a counter in the store, so that a slow replica, or one
with long answers, holds up nothing but what it is at. Which replica answers a prompt changes no sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.distributed import Store


class Tickets:
    """One rank's view.

    Args:
        store: of all rollout ranks.
        replica, num_replicas: this rank's rollout replica, and how many there are.
        leads: whether this rank takes for its replica; the others learn what it took.
    """

    def __init__(self, store: Store, replica: int, num_replicas: int, leads: bool) -> None:
        self._store, self._replica, self._num_replicas, self._leads = store, replica, num_replicas, leads
        self._batches = 0  # shared out so far
        self._written: list[str] = []  # keys of the last batch

    def parts(self, prompts: Sequence[int], size: int) -> Iterator[list[int]]:
        """This replica's parts of ``prompts``, one after the other; all ranks of all replicas call it for a batch,
        and meet before the next.

        Args:
            size: most prompts of a part: what a replica generates at once. Where all prompts fit the replicas at once
                they are dealt out instead: nobody would be free before the others have begun.
        """
        self._batches += 1
        for key in self._written:  # every rank has read them: a batch ends for all ranks together
            self._store.delete_key(key)
        self._written = []
        if len(prompts) <= size * self._num_replicas:
            yield list(prompts[self._replica :: self._num_replicas])
            return
        taken = 0
        while (number := self._take(taken)) * size < len(prompts):
            yield list(prompts[number * size : (number + 1) * size])
            taken += 1

    def _take(self, taken: int) -> int:
        """The number of this replica's next part."""
        key = f"tickets/{self._batches}"
        if not self._leads:
            return int(self._store.get(f"{key}/{self._replica}/{taken}"))
        number = self._store.add(key, 1) - 1
        own = f"{key}/{self._replica}/{taken}"
        self._store.set(own, str(number))
        self._written += [own, key] if number == 0 else [own]
        return number
