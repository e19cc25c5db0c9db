"""The proof of conversions: every family passes it, and it finds each fault, as unique ids through real tensors do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from models.oracle import DEEPSEEK_V3, LLAMA, QWEN2, QWEN3_MOE, megatron_by_hand, rollout_by_hand

from megatron_rl.models import Architecture, Experts, logical_tensors, megatron_layout, rollout_layout
from megatron_rl.models.conversion_proof import examine_megatron, examine_rollout, prove
from megatron_rl.models.hf_config import architecture_from_hf
from megatron_rl.models.layout_proof import Finding
from megatron_rl.models.layouts import hf_layout, rollout_vocab
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory

SIZES = [
    (ParallelSizes(), 1, 1),
    (ParallelSizes(tp=4, pp=2), 4, 1),
    (ParallelSizes(tp=2, pp=2, vpp=2), 8, 1),
    (ParallelSizes(tp=2, pp=2, ep=2), 4, 2),
    (ParallelSizes(tp=2, ep=2, etp=2), 4, 4),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_bijection_in_every_layout(name) -> None:
    a = architecture_from_hf(FAMILIES[name])
    for sizes, tp, ep in SIZES:
        if (a.experts is None and sizes.ep > 1) or (a.experts is not None and a.experts.biased and sizes.etp > 1):
            continue
        found = prove(a, logical_tensors(a), sizes, tp, ep)
        assert found.faults == ()
        assert str(found).splitlines()[-1].startswith("proved: a bijection")
        padded = {finding.name.removeprefix("chunk0.") for finding in found.findings if finding.kind == "padded"}
        assert "embedding.word_embeddings.weight" in padded


def changed(layout: Layout, change: Callable[[Shard], Shard]) -> Layout:
    return replace(layout, emit=lambda replica: [change(shard) for shard in layout.emit(replica)])


def of_shard(end: str, change: Callable[[Shard], Shard]) -> Callable[[Shard], Shard]:
    return lambda shard: change(shard) if shard.name.endswith(end) else shard


def row_dropped(shard: Shard) -> Shard:
    first, *rest = shard.spans
    return replace(shard, spans=(replace(first, row_start=first.row_start + 1, row=first.row + 1), *rest))


def rows_swapped(shard: Shard) -> Shard:
    first, *rest = shard.spans
    one = replace(first, row_stop=first.row_start + 1)
    two = replace(one, row_start=one.row_start + 1, row_stop=one.row_stop + 1)
    others = replace(first, row_start=first.row_start + 2, row=first.row + 2)
    return replace(shard, spans=(replace(one, row=first.row + 1), replace(two, row=first.row), others, *rest))


def span_repeated(shard: Shard) -> Shard:
    """In the place of the rows behind it."""
    first, *_ = shard.spans
    count = first.num_rows // 2
    one = replace(first, row_stop=first.row_start + count)
    return replace(shard, spans=(one, replace(one, row=first.row + count), *shard.spans[1:]))


def span_over_another(shard: Shard) -> Shard:
    first, *_ = shard.spans
    count = first.num_rows // 2
    return replace(shard, spans=(*shard.spans, replace(first, row_stop=first.row_start + count, row=first.row + count)))


def ids(a: Architecture) -> dict[str, torch.Tensor]:
    """Every element of the model has a number of its own, from 1 on; padding is 0."""
    found, start = {}, 1
    for name, shape in logical_tensors(a).items():
        size = torch.Size(shape).numel()
        found[name] = torch.arange(start, start + size, dtype=torch.float64).view(shape)
        start += size
    return found


def ids_differ(layout: Layout, a: Architecture, by_hand: Callable[[int], dict[str, torch.Tensor]]) -> bool:
    source = in_memory(ids(a), hf_layout(a))
    for rank in layout.replica_of:
        tensors = empty_tensors(layout, rank, torch.float64)
        fill(layout, rank, tensors, source)
        expected = by_hand(rank)
        assert expected.keys() == tensors.keys()
        if any(not torch.equal(tensors[name], expected[name]) for name in tensors):
            return True
    return False


FAULTS = [
    (row_dropped, "dropped", "rows? 0"),
    (rows_swapped, "moved", "row 1"),
    (span_repeated, "duplicated", "rows 0 to"),
    (span_over_another, "duplicated", "rows 0 to"),
]
MODELS = [(LLAMA, 2), (QWEN2, 4), (QWEN3_MOE, 2), (DEEPSEEK_V3, 2)]


def check(found: Iterator[Finding], differs: bool, kind: str | None, tensor: str, rows: str) -> None:
    faults = [finding for finding in found if finding.fault]
    assert bool(faults) == differs == (kind is not None)
    if kind is not None:
        named = [finding for finding in faults if finding.kind == kind and tensor in finding.name]
        assert named, faults
        assert any(re.search(rows, finding.where) for finding in named), named


@pytest.mark.parametrize(("a", "tp"), MODELS, ids=lambda value: getattr(value, "family", str(value)))
def test_faults_of_megatrons_layout_are_found_as_ids_find_them(a, tp) -> None:
    sizes = ParallelSizes(tp=tp, pp=2, ep=2) if a.experts else ParallelSizes(tp=tp, pp=2)
    vocab, grid = padded_vocab(a.vocab, tp), RankGrid(sizes, 2 * tp)
    layout, full = megatron_layout(a, grid, vocab), ids(a)
    by_hand = lambda rank: megatron_by_hand(a, full, grid, rank, vocab)  # noqa: E731
    check(examine_megatron(a, layout, sizes, vocab), ids_differ(layout, a, by_hand), None, "", "")
    for change, kind, rows in FAULTS:
        end, tensor = (
            ("0.self_attention.linear_proj.weight", "o_proj")
            if a.mla
            else ("0.self_attention.linear_qkv.weight", "q_proj")
        )
        other = changed(layout, of_shard(end, change))
        check(examine_megatron(a, other, sizes, vocab), ids_differ(other, a, by_hand), kind, tensor, rows)


@pytest.mark.parametrize(("a", "tp"), MODELS, ids=lambda value: getattr(value, "family", str(value)))
def test_faults_of_sglangs_layout_are_found_as_ids_find_them(a, tp) -> None:
    ep = 2 if a.experts else 1
    layout, full = rollout_layout(a, tp, [range(tp)], ep), ids(a)
    by_hand = lambda rank: rollout_by_hand(a, full, rank, tp, ep, rollout_vocab(a.vocab, tp))  # noqa: E731
    check(examine_rollout(a, layout, tp, ep), ids_differ(layout, a, by_hand), None, "", "")
    for change, kind, rows in FAULTS:
        end, tensor = (
            ("layers.1.self_attn.o_proj.weight", "o_proj") if a.mla else ("1.self_attn.qkv_proj.weight", "q_proj")
        )
        other = changed(layout, of_shard(end, change))
        check(examine_rollout(a, other, tp, ep), ids_differ(other, a, by_hand), kind, tensor, rows)


def test_what_files_lack_have_too_much_or_in_another_shape_is_named() -> None:
    stored = logical_tensors(QWEN2)
    del stored["model.layers.1.mlp.up_proj.weight"]
    stored |= {
        "model.layers.0.mlp.extra.weight": (3, 4),
        "lm_head.weight": (50, 24),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
        "model.norm.weight": (25,),
    }
    found = prove(QWEN2, stored, ParallelSizes(tp=2), 2)
    assert [str(finding) for finding in found.faults] == [
        "missing: model.layers.1.mlp.up_proj.weight [32, 24]: no file has it",
        "of another shape: model.norm.weight [25] in the file, [24] by config.json",
        "unclaimed: model.layers.0.mlp.extra.weight rows 0 to 2: neither trained nor exported",
    ]
    named = {finding.name for finding in found.findings if finding.kind == "unclaimed" and not finding.fault}
    assert named == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert "not proved: 3 faults" in str(found)


def test_twelve_layers_of_a_model_with_256_experts_take_seconds() -> None:
    a = replace(
        QWEN3_MOE, num_layers=12, hidden=7168, ffn=18432, num_heads=128, num_kv_heads=8, head_dim=128, vocab=129280,
        experts=Experts(256, 8, 2048, dense_layers=(0,)),
    )  # fmt: skip
    start = time.process_time()
    found = prove(a, logical_tensors(a), ParallelSizes(tp=8, pp=4, ep=64), 32, 32)
    assert found.faults == ()
    assert found.num_elements > 1.2e11
    assert time.process_time() - start < 60
