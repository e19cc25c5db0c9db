"""Which tensors of a model a Megatron checkpoint (``torch_dist``) stores, under which keys, and where a parameter lies.

A checkpoint stores whole tensors, whatever layout wrote them: those of a model on one rank. Layers that are all alike
are stacked into one tensor (megatron.core TransformerBlock.sharded_state_dict), and so are the experts of a layer
(SequentialMLP.sharded_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layouts import megatron_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Shard
from megatron_rl.reshard.rectangle import Rectangle

# The local spec's norms are stored under TransformerEngine's names (gpt_layer_specs sharded_state_dict_keys_map).
RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
RENAMED_LOCALLY = ("input_layernorm.weight", "pre_mlp_layernorm.weight")  # where attention has no latents
# Linear layers that a checkpoint keeps an (empty) extra state of, which Megatron-Core asks for when it loads.
STATEFUL = re.compile(r"\.linear_(qkv|proj|q_proj|q_up_proj|kv_up_proj|fc1|fc2)\.weight$")


class Stored(NamedTuple):
    """Where a parameter of a one-rank model lies in a checkpoint."""

    key: str
    place: tuple[int, ...]  # in the leading, stacked dims of the stored tensor


@dataclass(frozen=True)
class StoredPart:
    """One shard of the one-rank layout, and where it lies.

    Attributes:
        lead: sizes of the leading, stacked dims.
        shard: in the one-rank layout of `one_rank`.
        stateful: the checkpoint has an extra state beside it.
    """

    stored: Stored
    lead: tuple[int, ...]
    shard: Shard
    stateful: bool

    @property
    def state_key(self) -> str:
        """Of its extra state (megatron.core ShardedObject.unique_key)."""
        offset, size = (".".join(map(str, numbers)) for numbers in (self.stored.place or (0,), self.lead or (1,)))
        return f"{self.stored.key.removesuffix('weight')}_extra_state/shard_{offset}_{size}"


class HeldPart(NamedTuple):
    """The part of a shard of the one-rank layout that a rank of another layout holds."""

    rank: int
    rectangle: Rectangle


def candidates(name: str) -> Iterator[Stored]:
    """Where a parameter of a one-rank model may be stored: its own name, or stacked with other layers and experts."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        yield Stored(name, ())
        return
    layer, rest = int(parts[2]), ".".join(parts[3:])
    index: tuple[int, ...] = ()
    if rest.startswith("mlp.experts.local_experts."):
        index = (int(parts[6]),)
        rest = "mlp.experts.experts." + ".".join(parts[7:])
    for spelling in (rest, RENAMED.get(rest)):
        if spelling is not None:
            yield Stored(f"decoder.layers.{spelling}", (layer, *index))
            yield Stored(f"decoder.layers.{layer}.{spelling}", index)


def are_stacked(a: Architecture) -> bool:
    """Whether the layers are stored as one tensor: where Megatron-LM's ``moe_layer_freq`` says that all are alike."""
    return a.experts is None or not a.experts.dense_layers


def one_rank(a: Architecture, padded: int) -> tuple[Shard, ...]:
    """The shards of a model on one rank."""
    return megatron_layout(a, RankGrid(ParallelSizes(), 1), padded).shards(0)


def stored_parts(a: Architecture, padded: int) -> Iterator[StoredPart]:
    """Everything that a checkpoint of a language model stores, as Megatron-Core's local spec names it.

    Args:
        padded: rows of the embedding.
    """
    stacked, experts = are_stacked(a), a.experts.num_experts if a.experts is not None else 0
    for shard in one_rank(a, padded):
        found = list(candidates(shard.name))
        in_layer = len(found) > 1
        renamed = a.mla is None and shard.name.split(".", 3)[-1] in RENAMED_LOCALLY
        stored = found[2 * renamed + (not stacked)] if in_layer else found[0]
        of_expert = ".local_experts." in shard.name
        lead = (a.num_layers,) * (in_layer and stacked) + (experts,) * of_expert
        stateful = in_layer and STATEFUL.search(shard.name) is not None
        if of_expert and a.experts is not None and a.experts.biased:
            stateful = False  # no linear layers of Megatron-Core's
        yield StoredPart(stored, lead, shard, stateful)


def held_parts(a: Architecture, sizes: ParallelSizes, padded: int) -> dict[str, list[HeldPart]]:
    """Shard of the one-rank layout -> its parts on the ranks that hold it first; together they are all of it."""
    full = replace(a, vocab=padded)  # padding is held as other rows are
    places: dict[str, list[tuple[str, Rectangle, int, int]]] = {}  # tensor -> shard, what it holds, and where
    for shard in one_rank(full, padded):
        for span in shard.spans:
            places.setdefault(span.tensor, []).append((shard.name, span.rectangle, span.row, span.col))
    layout = megatron_layout(full, RankGrid(sizes, sizes.smallest_world), padded)
    found: dict[str, dict[Rectangle, int]] = {}
    for replica, ranks in layout.replicas.items():
        for shard in layout.emit(replica):
            parts: dict[str, list[Rectangle]] = {}
            for span in shard.spans:
                for name, held, row, col in places[span.tensor]:
                    if common := span.rectangle.intersection(held):
                        down, across = common.row_start - held.row_start, common.col_start - held.col_start
                        moved = common.moved(row + down, col + across)
                        parts.setdefault(name, []).append(moved)
            for name, rectangles in parts.items():
                for rectangle in joined(rectangles):
                    found.setdefault(name, {}).setdefault(rectangle, ranks[0])
    return {name: [HeldPart(rank, r) for r, rank in parts.items()] for name, parts in found.items()}


def joined(rectangles: list[Rectangle]) -> list[Rectangle]:
    """Rectangles that lie below one another as one."""
    result: list[Rectangle] = []
    for one in sorted(rectangles):
        last = result[-1] if result else None
        if last and last.row_stop == one.row_start and last[2:] == one[2:]:
            result[-1] = Rectangle(last.row_start, one.row_stop, one.col_start, one.col_stop)
        else:
            result.append(one)
    return result
