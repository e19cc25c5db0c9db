"""Evaluation of offline training (DPO, KTO, SFT, reward models): the algorithm's loss and metrics on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.algorithms import OfflineAlgorithm
from megatron_rl.batch import Batch
from megatron_rl.data import DataError
from megatron_rl.parallel import ParallelContext


class OfflineEvaluation:
    """Means over all rows of a data set, whatever the number of ranks.

    Args:
        rows: all of them, on every rank.
        pack: rows to batch, as the training loader does it.

    Raises:
        DataError: fewer rows than data-parallel ranks.
    """

    def __init__(
        self,
        algorithm: OfflineAlgorithm,
        rows: Sequence[Any],
        pack: Callable[[Sequence[Any]], Batch],
        context: ParallelContext,
    ) -> None:
        if len(rows) < context.dp_size:
            raise DataError(
                f"the evaluation data has {len(rows)} rows for {context.dp_size} data-parallel ranks: give at least as "
                "many"
            )
        self.algorithm = algorithm
        dp, size = context.coordinates.dp, context.dp_size
        # Contiguous, as in training: all ranks' rows end to end are the data set, whatever their number.
        self.rows = list(rows)[len(rows) * dp // size : len(rows) * (dp + 1) // size]
        self.num_rows = len(rows)
        self.pack = pack

    def __call__(self) -> dict[str, float]:
        """``eval/loss/total``, ``eval/rewards/accuracies`` and so on, the same on all ranks. Collective."""
        metrics = self.algorithm.evaluate(self.pack(self.rows))
        return {f"eval/{name}": value for name, value in metrics.items()} | {"eval/num_rows": float(self.num_rows)}
