"""`prove`: that files go into Megatron's ranks, back, and into SGLang's ranks as a bijection, or what is not.

From a config and the headers of the files alone. The rules by which both systems cut a whole tensor are written down
here once more, apart from the layouts: Megatron-Core cuts one dim into equal parts, and each half of a gated layer
(mlp.py apply_swiglu_sharded_factory); SGLang cuts each of the projections that a tensor is fused of (linear.py
QKVParallelLinear and MergedColumnParallelLinear, fused_moe_triton/layer.py FusedMoE).
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import describe
from megatron_rl.models.layers_behind import layers_behind, predicts_tokens
from megatron_rl.models.layout_proof import MISSING, RESHAPED, UNCLAIMED, Finding, Piece, examine, rows_text
from megatron_rl.models.layouts import MegatronReplica, logical_tensors, megatron_layout, rollout_layout
from megatron_rl.models.pipeline import padded_vocab, stage_layers
from megatron_rl.models.stored_tensors import one_rank
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Layout, Shard, matrix_shape
from megatron_rl.reshard.rectangle import Rectangle

EMBEDDING = "embedding.word_embeddings.weight"  # of Megatron
CHUNK_LAYER = re.compile(r"(?:chunk(\d+)\.)?decoder\.layers\.(\d+)\.")
LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Proof:
    """What is proved of one model.

    Attributes:
        layouts: names of the layouts that were examined.
        findings: of all kinds; an empty list of `faults` is a bijection.
    """

    num_tensors: int
    num_elements: int
    layouts: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.fault)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        what = f"{self.num_tensors} tensors, {self.num_elements:,} elements; {'; '.join(self.layouts)}"
        if self.faults:
            return "\n".join([*lines, f"not proved: {len(self.faults)} faults ({what})"])
        kept = "each element has one place, and comes back from it"
        return "\n".join([*lines, f"proved: a bijection, {kept} ({what})"])


def prove(
    a: Architecture,
    stored: Mapping[str, tuple[int, ...]],
    sizes: ParallelSizes,
    rollout_tp: int = 1,
    rollout_ep: int = 1,
    drop_mtp: bool = False,
) -> Proof:
    """Examine the way of every row.

    Args:
        stored: name -> shape of each tensor of the files.
        sizes: of Megatron's layout.
        rollout_tp, rollout_ep: of SGLang's.
        drop_mtp: layers of multi-token prediction are to be left out, and are no fault.

    Raises:
        ConfigError: the sizes do not fit the model.
    """
    logical = logical_tensors(a)
    vocab = padded_vocab(a.vocab, sizes.tp)
    num_ranks = sizes.smallest_world
    megatron = megatron_layout(a, RankGrid(sizes, num_ranks), vocab)
    rollout = rollout_layout(a, rollout_tp, [range(rollout_tp)], rollout_ep)
    findings = [
        *files(a, stored, drop_mtp),
        *examine_megatron(a, megatron, sizes, vocab),
        *examine_rollout(a, rollout, rollout_tp, rollout_ep),
    ]
    elements = sum(math.prod(shape) for shape in logical.values())
    return Proof(len(logical), elements, (megatron.name, rollout.name), tuple(dict.fromkeys(findings)))


def files(a: Architecture, stored: Mapping[str, tuple[int, ...]], drop_mtp: bool = False) -> Iterator[Finding]:
    """How the tensors of the files differ from those of the model."""
    expected, model = logical_tensors(a), describe(replace(a, tied=False, value_model=False))
    for name, shape in expected.items():
        if name not in stored:
            yield Finding(MISSING, name, f"{list(shape)}: no file has it")
        elif stored[name] != shape:
            yield Finding(RESHAPED, name, f"{list(stored[name])} in the file, {list(shape)} by config.json")
    extra = stored.keys() - expected.keys()
    for prefix, names in layers_behind(extra, a).items():
        if predicts_tokens(names):
            extra -= set(names)
            where = f"({len(names)} tensors): it predicts several tokens (MTP), and is left out only by --drop-mtp"
            yield Finding(UNCLAIMED, f"{prefix}*", where, not drop_mtp)
    for name in sorted(extra):
        rows = rows_text(Rectangle(0, matrix_shape(stored[name])[0], 0, 1))
        if name == model.output.hf and a.tied:
            yield Finding(
                UNCLAIMED, name, f"{rows}: the embedding takes its place (tied), to which it must be equal", False
            )
        elif "rotary_emb" in name:
            yield Finding(UNCLAIMED, name, f"{rows}: a buffer that is computed from config.json", False)
        else:
            yield Finding(UNCLAIMED, name, f"{rows}: neither trained nor exported")


def examine_megatron(a: Architecture, layout: Layout, sizes: ParallelSizes, vocab: int) -> Iterator[Finding]:
    """What ``layout`` does, against Megatron-Core's cuts of the one-rank model."""
    reference = one_rank(a, vocab)
    shapes = {shard.name: shard.shape for shard in reference}

    def cut(replica: Hashable, shard: Shard) -> Iterator[Piece]:
        assert isinstance(replica, MegatronReplica)
        name = _global_name(a, sizes, replica, shard.name)
        if name not in shapes:  # the output layer of a tied model on the last stage
            name = EMBEDDING
        of_expert = ".local_experts." in name
        index = replica.etp if of_expert else replica.tp
        halves = 2 if ".linear_fc1." in name and not (of_expert and a.experts and a.experts.biased) else 1
        yield from _pieces(name, matrix_shape(shard.shape), matrix_shape(shapes[name]), index, halves)

    yield from examine(layout, reference, logical_tensors(a), cut)


def _global_name(a: Architecture, sizes: ParallelSizes, at: MegatronReplica, name: str) -> str:
    """The name in the one-rank model of a parameter of a rank."""

    def layer(found: re.Match[str]) -> str:
        layers = stage_layers(a.num_layers, sizes.pp, sizes.vpp, at.pp, int(found[1] or 0))
        return f"decoder.layers.{layers[int(found[2])]}."

    name = re.sub(r"^chunk\d+\.(?!decoder\.layers)", "", CHUNK_LAYER.sub(layer, name))
    first = at.ep * (a.experts.num_experts // sizes.ep) if a.experts is not None else 0
    return LOCAL_EXPERT.sub(lambda found: str(first + int(found[1])), name)


def _pieces(name: str, mine: tuple[int, int], whole: tuple[int, int], index: int, halves: int) -> Iterator[Piece]:
    """Equal parts of one dim, of each of ``halves``."""
    (rows, cols), (all_rows, _) = mine, whole
    if rows == all_rows:
        yield Piece(name, Rectangle(0, rows, 0, cols), 0, index * cols if cols != whole[1] else 0)
        return
    part = rows // halves
    for half in range(halves):
        held = Rectangle(half * part, (half + 1) * part, 0, cols)
        yield Piece(name, held, half * all_rows // halves + index * part, 0)


def examine_rollout(a: Architecture, layout: Layout, tp: int, ep: int) -> Iterator[Finding]:
    """What ``layout`` does, against SGLang's cuts of the model on one rank."""
    reference = rollout_layout(a, 1, [[0]]).shards(0)
    shapes = {shard.name: shard.shape for shard in reference}
    moe_tp = tp // ep

    def cut(replica: Hashable, shard: Shard) -> Iterator[Piece]:
        assert isinstance(replica, int)
        if shard.like and not shard.spans:
            return  # held by another rank alone, which adds it once
        whole, last = shapes[shard.name], shard.name.rpartition(".")[2]
        parts = shard.name.split(".")
        if "experts" in parts:
            halves = 2 if last == "w13_weight" and not (a.experts and a.experts.biased) else 1
            yield from _expert_pieces(shard, whole, replica // moe_tp, replica % moe_tp, halves)
        elif "qkv_proj" in parts and shard.shape != whole:
            yield from _head_pieces(a, shard, replica, tp)
        else:
            halves = 2 if "gate_up_proj" in parts else 1
            yield from _pieces(shard.name, matrix_shape(shard.shape), matrix_shape(whole), replica, halves)

    yield from examine(layout, reference, logical_tensors(a), cut)


def _head_pieces(a: Architecture, shard: Shard, rank: int, tp: int) -> Iterator[Piece]:
    """Query heads in equal blocks; key and value heads too, or one for several ranks."""
    cols, queries, keys = shard.matrix_shape[1], a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    kept = max(keys // tp, a.head_dim)
    row, start = 0, 0
    for size, part in ((queries, queries // tp), (keys, kept), (keys, kept)):
        first = rank * size // tp // part * part
        yield Piece(shard.name, Rectangle(row, row + part, 0, cols), start + first, 0)
        row, start = row + part, start + size


def _expert_pieces(shard: Shard, whole: Sequence[int], ep_rank: int, tp_rank: int, halves: int) -> Iterator[Piece]:
    """A block of experts, and of each of them equal parts."""
    count, inner = shard.shape[0], matrix_shape((1, *shard.shape[1:]))
    all_inner = matrix_shape((1, *whole[1:]))
    for local in range(count):
        expert = ep_rank * count + local
        for piece in _pieces(shard.name, inner, all_inner, tp_rank, halves):
            held = piece.held
            down = Rectangle(held.row_start + local * inner[0], held.row_stop + local * inner[0], *held[2:])
            yield Piece(piece.shard, down, piece.row + expert * all_inner[0], piece.col)
