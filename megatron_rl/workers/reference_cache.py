"""`CachedReference`: log-probabilities of a fixed data set under the reference, computed once and kept on disk.

It takes the place of a `Reference` and looks rows up by their tokens. No frozen copy of the weights is held while
training. A file is valid for one set of weights (by checksum, whatever the layout), one set of rows and one precision;
its name is their digest.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.ops.span_checksum import span_checksum, tensor_key
from megatron_rl.reshard.layout import Span, matrix_shape
from megatron_rl.reshard.rectangle import Rectangle
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.forward_only import forward_only
from megatron_rl.workers.outputs import logprob_output
from megatron_rl.workers.reference import Reference

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256  # sequences whose log-probabilities are computed between two exchanges
FORMAT = "1"  # of the file and of the values: changed whenever either is


class CachedReference:
    """The reference's log-probabilities of known rows.

    Args:
        actor: its present weights are the reference's. Collective.
        batches: all rows of the data set, packed, the same on every rank; masks say what counts as response.
        folder: where the files are kept; every rank must see it.
        fallback: computes rows that are not in the data set (KTO's mismatched ones); None: they are an error.
    """

    def __init__(
        self, actor: Actor, batches: Iterable[Batch], folder: str | Path, fallback: Reference | None = None
    ) -> None:
        self.context = actor.context
        self.fallback = fallback
        rows = {digest: row for batch in batches for digest, row in split_rows(batch)}
        key = cache_key(actor.engine, sorted(rows))
        self.path = Path(folder).expanduser() / f"{key}.pt"
        self.was_found = self.path.is_file()
        if not self.was_found:
            with actor.engine.base():  # with LoRA the reference is the frozen model
                found = compute(actor.engine, list(rows.items()))
            if self.context.rank == 0:
                write(self.path, found)
        torch.distributed.barrier(group=self.context.host_group)
        stored = torch.load(self.path, weights_only=True)
        parts = stored["logprobs"].split(stored["lengths"].tolist())
        self.rows = dict(zip(stored["digests"], parts, strict=True))
        logger.info(
            "reference log-probabilities of %d rows %s %s",
            len(self.rows),
            "read from" if self.was_found else "written to",
            self.path,
        )

    def logprobs(self, write: str = "ref_logprobs") -> Stage:
        """As `Reference.logprobs`.

        Raises:
            KeyError: when run, a row was not in the data set, and there is no fallback.
        """

        def run(batch: Batch) -> None:
            found = [self.rows.get(digest) for digest, _ in split_rows(batch)]
            missing = sum(row is None for row in found)
            if not any(self.context.gather_objects(missing)):
                known = [row for row in found if row is not None]
                batch.tokens[write] = torch.cat(known) if known else torch.zeros(0)
                return
            if self.fallback is None:
                raise KeyError(
                    f"{missing} of {len(found)} rows are not in {self.path}: the cache was made for another data set, "
                    "or the rows were changed after loading"
                )
            self.fallback.logprobs(write).run(batch)

        place = "host memory" if self.fallback is None else str(self.context.sizes)
        return Stage("reference.cached", run, reads=("input_ids", "response_mask"), writes=(write,), place=place)


def split_rows(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Each sequence by itself, under the digest of its tokens and mask."""
    for index in range(batch.num_sequences):
        start, stop = int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1])
        ids, mask = batch["input_ids"][start:stop], batch["response_mask"][start:stop]
        digest = hashlib.blake2b(ids.numpy().tobytes() + b"|" + mask.numpy().tobytes(), digest_size=16).hexdigest()
        bounds = torch.tensor([0, stop - start])
        yield digest, Batch(cu_seqlens=bounds, tokens={"input_ids": ids, "response_mask": mask})


def compute(engine: TrainingEngine, rows: Sequence[tuple[str, Batch]]) -> dict[str, Tensor]:
    """Log-probabilities by digest, on every rank; the data-parallel ranks share the rows."""
    context = engine.context
    found: dict[str, Tensor] = {}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        mine = rows[start : start + ROWS_AT_ONCE][context.coordinates.dp :: context.dp_size]
        batch = joined([row for _, row in mine])
        values = forward_only(engine, batch, logprob_output)  # also of no rows: other replicas wait in collectives
        parts = values.split(batch.lengths.tolist()) if mine else ()
        share = [(digest, part.clone()) for (digest, _), part in zip(mine, parts, strict=True)]
        shares = context.gather_objects(share)
        found.update(pair for part in shares for pair in part)
    return found


def joined(rows: Sequence[Batch]) -> Batch:
    """Rows packed into one batch."""
    ids = [row["input_ids"].tolist() for row in rows]
    return Batch.from_sequences(ids, [row["response_mask"].tolist() for row in rows])


def write(path: Path, found: dict[str, Tensor]) -> None:
    """Write the file under another name and rename it, so that it is never seen incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lengths = torch.tensor([value.numel() for value in found.values()])
    torch.save({"digests": list(found), "lengths": lengths, "logprobs": torch.cat([*found.values()])}, partial)
    partial.replace(path)


def cache_key(engine: TrainingEngine, digests: Sequence[str]) -> str:
    """Name of the file for these weights and rows; the same on every rank and layout."""
    version = f"{FORMAT} {engine.dtype} {weights_checksum(engine)}"
    return hashlib.blake2b("\n".join([version, *digests]).encode(), digest_size=16).hexdigest()


def weights_checksum(engine: TrainingEngine) -> int:
    """Checksum of all logical tensors; each rectangle is counted once, whichever ranks hold it."""
    engine.sync_parameters()
    context, tensors = engine.context, engine.tensors()
    own: dict[tuple[str, Rectangle], int] = {}
    for shard in engine.layout.shards(context.rank):
        tensor = tensors[shard.name].detach().contiguous()
        _, stride = matrix_shape(tuple(tensor.shape))
        for span in shard.spans:
            own[span.tensor, span.rectangle] = int(
                span_checksum([tensor.view(-1)], spans_table(span, stride, tensor.dtype))
            )
    merged = {place: value for part in context.gather_objects(own) for place, value in part.items()}
    return sum(merged.values()) % 2**64


def spans_table(span: Span, stride: int, dtype: torch.dtype) -> Tensor:
    """One row of `span_checksum`'s table: ``span`` in a tensor of ``stride`` columns."""
    key = tensor_key(span.tensor, dtype)
    offset = span.row * stride + span.col
    return torch.tensor(
        [[0, 0, key, span.row_start, span.col_start, offset, span.num_rows, span.num_cols, stride]], dtype=torch.int64
    )
