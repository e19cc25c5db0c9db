"""How SGLang's classes usually hold a model of which nothing but its files' tensors is known: those without a family.

Most of them stack query, key and value, gate and up, and the experts of a layer, and pad the vocabulary
(sglang.srt.layers.linear, .moe.fused_moe_triton, .vocab_parallel_embedding of 0.5.23), each under one name. A server
whose class does otherwise is still written rightly, because its own loader places whole tensors: these shards are what
travels, and what its checksums are compared with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from megatron_rl.models.parameters import Shape, whole
from megatron_rl.reshard.layout import Shard, Span, matrix_shape, stack_rows

# The name in SGLang -> those in files, from the first row on. The last ones lie in one tensor for latent attention.
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERT = re.compile(r"(.*experts\.)\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
VOCAB_UNIT = 64


def usual_shards(tensors: Mapping[str, Shape], vocab: int) -> list[Shard]:
    """All of a model on one rank, by SGLang's names; where a group is not complete, each tensor by its own.

    Args:
        tensors: of the files, names and shapes.
        vocab: rows of embeddings and output layers, which are padded.
    """
    found, done = [], set[str]()
    for name, shape in tensors.items():
        if name in done:
            continue
        shards = list(_experts(name, tensors) or _stacked(name, tensors) or [_alone(name, shape, vocab)])
        found += shards
        done.update(span.tensor for shard in shards for span in shard.spans)
    return found


def _alone(name: str, shape: Shape, vocab: int) -> Shard:
    if shape[0] != vocab or not re.search(r"(^|\.)(embed_tokens|lm_head|wte|embedding)\.weight$", name):
        return whole(name, name, shape)
    rows, cols = matrix_shape(shape)
    return Shard(name, (-(-rows // VOCAB_UNIT) * VOCAB_UNIT, *shape[1:]), (Span(name, 0, rows, 0, cols, 0, 0),))


def _stacked(name: str, tensors: Mapping[str, Shape]) -> list[Shard]:
    prefix, _, last = name.rpartition(".")
    prefix, _, own = prefix.rpartition(".")
    for fused, parts in STACKED.items():
        names = [f"{prefix}.{part}.{last}" for part in parts]
        if own in parts and all(part in tensors for part in names):
            shapes = [tensors[part] for part in names]
            if len({shape[1:] for shape in shapes}) == 1:
                rows = [shape[0] for shape in shapes]
                pieces = [(part, 0, count) for part, count in zip(names, rows, strict=True)]
                shape = (sum(rows), *shapes[0][1:])
                return [Shard(f"{prefix}.{fused}.{last}", shape, stack_rows(pieces, matrix_shape(shape)[1]))]
    return []


def _experts(name: str, tensors: Mapping[str, Shape]) -> list[Shard]:
    """``w13_weight`` [experts, 2 * size, hidden] = [gate ; up] of each and ``w2_weight`` [experts, hidden, size]."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return []
    prefix = match[1]
    for names in zip(GATE, UP, DOWN, strict=True):
        groups = list(_numbered(prefix, names, tensors))
        shapes = {tuple(tensors[one] for one in group) for group in groups}
        if len(shapes) == 1:
            ((ffn, hidden), up, down) = next(iter(shapes))
            if up != (ffn, hidden) or down != (hidden, ffn):
                return []
            w13 = [(one, 0, ffn) for group in groups for one in group[:2]]
            w2 = [(group[2], 0, hidden) for group in groups]
            return [
                Shard(f"{prefix}w13_weight", (len(groups), 2 * ffn, hidden), stack_rows(w13, hidden)),
                Shard(f"{prefix}w2_weight", (len(groups), hidden, ffn), stack_rows(w2, ffn)),
            ]
    return []


def _numbered(prefix: str, names: tuple[str, str, str], tensors: Mapping[str, Shape]) -> Iterator[list[str]]:
    number = 0
    while all(f"{prefix}{number}.{name}.weight" in tensors for name in names):
        yield [f"{prefix}{number}.{name}.weight" for name in names]
        number += 1
