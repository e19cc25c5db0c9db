"""What few families or none have: tensors that are fused in the Hugging Face file (Phi-3's, against transformers' own),
and, in tiny families made here, norms whose weight lacks 1, on every way that weights take. And windows of two sizes,
which Megatron-Core has not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engines.megatron.model.test_hf_parity import megatron_logits, random_hf
from models.oracle import LLAMA, QWEN3_MOE, random_logical
from rollout.rollout_models import reference_logprobs
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.builder import transformer_config
from megatron_rl.models import FAMILIES, hf_layout, logical_tensors, megatron_layout, rollout_layout
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.experts import ExpertMLP
from megatron_rl.models.family import ModelFamily, family_of
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.parallel.context import ParallelContext
from megatron_rl.reshard.layout import Recomputed, Span
from megatron_rl.rollout import LocalEngine, SamplingParams
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_out import save_hf
from megatron_rl.weights.source import in_memory
from megatron_rl.weights.sync import WeightSync

FUSED = replace(LLAMA, family="phi3")
LACKING = replace(LLAMA, family="lacking_one")
MIXED = replace(QWEN3_MOE, family="mixed")
TWO_WINDOWS = replace(LLAMA, family="two_windows")


class LackingOne(ModelFamily):
    """Norms multiply with 1 + weight."""

    def norm(self, a: Architecture, hf: str, size: int | None = None):
        return replace(super().norm(a, hf, size), offset=1.0)


class Mixed(type(family_of("qwen3_moe"))):
    """Norms and routers are fp32 in files and engines, whatever the model's dtype."""

    def norm(self, a: Architecture, hf: str, size: int | None = None):
        return replace(super().norm(a, hf, size), dtype=torch.float32)

    def mlp(self, a: Architecture, index: int):
        found = super().mlp(a, index)
        return replace(found, router_dtype=torch.float32) if isinstance(found, ExpertMLP) else found


class TwoWindows(ModelFamily):
    """Each layer has a window of its own."""

    def attention(self, a: Architecture, index: int):
        return replace(super().attention(a, index), window=7 + index % 2)


class Deriving(ModelFamily):
    """SGLang's model would keep a transposed copy of each output projection."""

    def layer(self, a: Architecture, index: int):
        turned = Recomputed("self_attn.w_t", "self_attn.o_proj.weight", torch.t)
        return replace(super().layer(a, index), recomputed=(turned,))


@pytest.fixture(scope="module", autouse=True)
def families() -> Iterator[None]:
    added = {"lacking_one": LackingOne, "two_windows": TwoWindows, "deriving": Deriving, "mixed": Mixed}
    for name, family in added.items():
        FAMILIES.register(name)(family)
    yield
    for name in added:
        del FAMILIES._entries[name]


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ParallelSizes(), seed=1)


IDS = torch.randint(0, LLAMA.vocab, (1, 24), generator=torch.Generator().manual_seed(3))


def test_a_model_with_fused_tensors_gives_transformers_logits(context) -> None:
    model = random_hf(FUSED)
    assert sorted(logical_tensors(FUSED)) == sorted(model.state_dict())
    with torch.no_grad():
        expected = model(IDS).logits
    found = megatron_logits(FUSED, context, model, IDS)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("sizes", "world"), [(ParallelSizes(tp=2, pp=2), 4), (ParallelSizes(tp=8), 8)], ids=str)
def test_every_rank_holds_the_same_whether_the_file_is_fused_or_not(sizes: ParallelSizes, world: int) -> None:
    apart = random_logical(LLAMA)
    together = {}
    for name, shape in logical_tensors(FUSED).items():
        parts = [name]
        if "qkv_proj" in name:
            parts = [name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"]
        elif "gate_up_proj" in name:
            parts = [name.replace("gate_up_proj", f"{half}_proj") for half in ("gate", "up")]
        together[name] = torch.cat([apart[part] for part in parts])
        assert together[name].shape == shape
    replicas = [list(range(start, start + sizes.tp)) for start in range(0, world, sizes.tp)]
    layouts = [
        (full, hf_layout(a), layout)
        for layout_of in (
            lambda a: megatron_layout(a, RankGrid(sizes, world), 64),
            lambda a: rollout_layout(a, sizes.tp, replicas),
        )
        for a, full in ((LLAMA, apart), (FUSED, together))
        for layout in [layout_of(a)]
    ]
    for rank in range(world):
        held = [empty_tensors(layout, rank, torch.float32) for _, _, layout in layouts]
        for tensors, (full, file, layout) in zip(held, layouts, strict=True):
            fill(layout, rank, tensors, in_memory(full, file))
        for mine, theirs in ((held[0], held[1]), (held[2], held[3])):
            assert sorted(mine) == sorted(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def lacking_weights() -> dict[str, torch.Tensor]:
    full = random_logical(LACKING)
    return {name: tensor * (0.2 if "norm" in name else 0.4) for name, tensor in full.items()}


def plain_llama(full: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The same model as transformers' Llama computes it, which multiplies norms with the weight itself."""
    model = LlamaForCausalLM(hf_config_from(LLAMA, dtype="float32")).eval()
    model.load_state_dict({name: tensor + 1.0 if "norm" in name else tensor for name, tensor in full.items()})
    return model


def test_megatron_computes_norms_that_lack_one_from_the_files_values(context, tmp_path) -> None:
    full = lacking_weights()
    with torch.no_grad():
        expected = plain_llama(full)(IDS).logits
    save_file(full, tmp_path / "model.safetensors")
    hf_config_from(LLAMA, dtype="float32").save_pretrained(tmp_path)
    found = megatron_logits(LACKING, context, tmp_path, IDS)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_rollout_rank_holds_one_more_and_a_source_gives_it_back() -> None:
    full, layout = lacking_weights(), rollout_layout(LACKING, 2, [[0, 1]])
    tensors = empty_tensors(layout, 1, torch.float32)
    fill(layout, 1, tensors, in_memory(full, hf_layout(LACKING)))
    norms = [name for name in full if "norm" in name]
    assert len(norms) == 2 * LACKING.num_layers + 1
    assert all(torch.equal(tensors[name], full[name] + 1.0) for name in norms)
    assert torch.equal(tensors["lm_head.weight"][: LLAMA.vocab - 32], full["lm_head.weight"][32:])
    source = in_memory(tensors, layout, 1)
    for name in norms:
        read = source.read(Span(name, 0, LACKING.hidden, 0, 1, 0, 0)).flatten()
        torch.testing.assert_close(read, full[name], atol=2e-7, rtol=0)


def test_a_push_adds_what_the_engine_holds_more_and_is_attested() -> None:
    source = megatron_layout(LACKING, RankGrid(ParallelSizes(), 1), 64)
    engine = LocalEngine(LACKING, rollout_layout(LACKING, 1, [[0]]))
    sync = WeightSync(source, engine, 0)
    for version in (1, 2):
        full = {name: tensor / version for name, tensor in lacking_weights().items()}
        trained = empty_tensors(source, 0, torch.float32)
        fill(source, 0, trained, in_memory(full, hf_layout(LACKING)))
        before = {name: tensor.clone() for name, tensor in trained.items()}
        sync.push(trained, version)
        assert all(torch.equal(trained[name], before[name]) for name in trained)
        assert torch.equal(engine.targets()["model.norm.weight"], full["model.norm.weight"] + 1.0)
        ((answer,),) = engine.generate([[5, 9, 11]], SamplingParams(max_tokens=12, ignore_eos=True))
        expected = reference_logprobs(plain_llama(full), [5, 9, 11], answer.token_ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)
    engine.close()


def test_a_push_carries_each_tensor_in_the_dtype_that_the_engine_holds() -> None:
    source = megatron_layout(MIXED, RankGrid(ParallelSizes(), 1), 64)
    full = random_logical(MIXED)
    trained = empty_tensors(source, 0, torch.float32)
    fill(source, 0, trained, in_memory(full, hf_layout(MIXED)))
    with LocalEngine(MIXED, rollout_layout(MIXED, 1, [[0]]), dtype=torch.bfloat16) as engine:
        for wire in (None, torch.bfloat16):
            WeightSync(source, engine, 0, wire_dtype=wire).push(trained, 1)
            exact = {name for name, tensor in engine.targets().items() if tensor.dtype == torch.float32}
            assert exact == {name for name in full if name.endswith(("norm.weight", "mlp.gate.weight"))}
            assert all(torch.equal(engine.targets()[name], full[name]) for name in exact)
            assert torch.equal(engine.targets()["lm_head.weight"][: MIXED.vocab], full["lm_head.weight"].bfloat16())
        ((answer,),) = engine.generate([[5, 9, 11]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert all(logprob <= 0.0 for logprob in answer.logprobs)


def test_a_saved_folder_has_the_dtypes_of_the_description_unless_one_is_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES._entries, "qwen3_moe", Mixed)
    architecture = replace(QWEN3_MOE, norm_eps=3e-6)  # described by no other test
    full = {name: tensor.bfloat16() for name, tensor in random_logical(architecture).items()}
    for dtype, expected in ((None, {torch.bfloat16, torch.float32}), (torch.float16, {torch.float16})):
        folder = tmp_path / str(dtype)
        save_hf(hf_layout(architecture), full, architecture, folder, rank=0, dtype=dtype)
        found = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == expected
        assert all(torch.equal(tensor, full[name].to(tensor.dtype)) for name, tensor in found.items())


def test_windows_of_two_sizes_are_refused_by_megatron_and_kept_apart_by_the_local_engine() -> None:
    with pytest.raises(ConfigError, match="sliding windows of 7, 8 tokens"):
        transformer_config(TWO_WINDOWS, ParallelSizes())
    with LocalEngine(TWO_WINDOWS, rollout_layout(TWO_WINDOWS, 1, [[0]])) as engine:
        assert [layer.window for layer in engine._decoder.layers] == [7, 8, 7, 8]


def test_a_description_says_what_engines_compute_from_the_weights() -> None:
    tensors = rollout_layout(replace(LLAMA, family="deriving"), 2, [[0, 1]]).recomputed
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(4) for name in ("w_t", "o_proj.weight")]
    assert [name for tensor in tensors for name in (tensor.name, tensor.source)] == names
