"""Ranks of Megatron-LM: its checkpoints -> Hugging Face -> a checkpoint that it loads, with the same logits throughout.

Arguments: a folder to work in. Each case saves in one layout and format and loads in another.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import megatron_rl  # noqa: F401  (first: the CPU face, before Megatron-LM is imported)

import torch  # isort: skip
import torch.distributed as dist
import upstream
from transformers import AutoModelForCausalLM

from megatron_rl.engines.conversion import convert
from megatron_rl.engines.megatron.build import from_hf
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.run.build import starting_model
from megatron_rl.run.run_config import RunConfig

LLAMA = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--ffn-hidden-size 96 --seq-length 16 --max-position-embeddings 64 --position-embedding-type rope "
    "--rotary-base 500000 --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --kv-channels 24"
)
QWEN2 = LLAMA.replace("--untie-embeddings-and-output-weights", "--add-qkv-bias")
MOE = LLAMA + (
    " --qk-layernorm --num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-router-load-balancing-type none"
    " --moe-token-dispatcher-type alltoall --disable-bias-linear"
)
# What is left to say where --use-checkpoint-args says the rest; see docs/megatron_lm.md.
BARE = "--use-checkpoint-args --seq-length 16 --max-position-embeddings 64 --norm-epsilon 1e-6"


@dataclass(frozen=True)
class Case:
    """A model, the layout and format it is saved in, and the layout it is loaded in."""

    name: str
    model: str
    layout: str = ""
    format: str = "torch_dist"
    loaded: str = ""
    sizes: ParallelSizes = ParallelSizes()  # noqa: RUF009  (frozen)


TOKENS = 301  # of NullTokenizer with --vocab-size 300
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
CASES = {
    1: [
        Case("dense", LLAMA),
        Case("llama3", LLAMA + " --use-rope-scaling", format="torch"),
        Case("tied", QWEN2, format="torch"),
        Case("experts", MOE),
        Case("some_experts", MOE + " --moe-layer-freq [0,1,1,1]"),
    ],
    2: [
        Case("dense", LLAMA, TP2, loaded=PP2, sizes=ParallelSizes(tp=2)),
        Case("dense_torch", LLAMA, TP2, "torch", PP2),
        Case("tied_torch", QWEN2, PP2, "torch", TP2, ParallelSizes(pp=2)),
        Case("interleaved_torch", LLAMA, PP2 + " --num-virtual-stages-per-pipeline-rank 2", "torch", TP2),
        Case("experts_torch", MOE, EP2, "torch", EP2),
        Case("uneven_torch", LLAMA, PP2 + " --decoder-first-pipeline-num-layers 3", "torch", PP2),
    ],
}


def check(case: Case, folder: Path) -> None:
    mine = folder / case.name
    common = f"--global-batch-size 4 --ckpt-format {case.format} --save {mine / 'saved'}"
    upstream.start(f"{case.model} {case.layout} {common}")
    model = upstream.build()
    upstream.shake(model)
    expected = upstream.logits(model)
    upstream.save(model)
    upstream.stop()

    convert(mine / "saved", mine / "hf", "hf")
    if expected is not None:
        assert_near(huggingface_logits(mine / "hf"), expected, f"{case.name}: exported logits")
    dist.barrier()
    upstream.mpu.destroy_model_parallel()
    check_start(case, mine)
    upstream.mpu.destroy_model_parallel()
    convert(mine / "hf", mine / "back", "megatron", case.sizes)
    upstream.mpu.destroy_model_parallel()

    for how in (case.model, BARE + flags(case.model)):
        upstream.start(f"{how} {case.loaded} --global-batch-size 4 --load {mine / 'back'}")
        model = upstream.build()
        upstream.load(model)
        found = upstream.logits(model)
        compare_over_layouts(found, expected, f"{case.name}: logits after --load ({how[:25]})")
        upstream.stop()


def check_start(case: Case, mine: Path) -> None:
    """A run with ``model=RUN``, Megatron-LM's folder with its pointer, starts from the weights that `convert` exports;
    so it does where ``model_config_path`` says what they are."""
    context = ParallelContext.create(case.sizes)
    exported = from_hf(mine / "hf", context).tensors()
    for described in (None, str(mine / "hf"), str(mine / "hf" / "config.json")):
        config = {"model": str(mine / "saved"), "model_config_path": described, "data": {"path": "-"}}
        run = RunConfig.parse(config | {"algorithm": {"name": "grpo"}, "rewards": [{"name": "exact"}]}, "")
        found = from_hf(starting_model(run), context).tensors()
        assert found.keys() == exported.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, exported[name]), f"{case.name}, described by {described}: {name}"


def flags(model: str) -> str:
    """What Megatron-LM does not take from a checkpoint."""
    kept = [flag for flag in ("--qk-layernorm", "--use-rope-scaling") if flag in model]
    return " ".join(["", *kept, "--moe-router-load-balancing-type none"] if "--num-experts" in model else ["", *kept])


def huggingface_logits(folder: Path) -> torch.Tensor:
    rows = torch.randint(0, 300, (2, upstream.SEQUENCE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(rows).logits


def compare_over_layouts(found: torch.Tensor | None, expected: torch.Tensor | None, what: str) -> None:
    """Ranks that have logits in one layout may have none in the other: the last rank has both."""
    if found is not None and expected is not None:
        assert_near(found, expected, what)
    elif dist.get_rank() == dist.get_world_size() - 1:
        raise AssertionError(f"{what}: the last rank has no logits")


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    found, expected = found[..., :TOKENS], expected[..., :TOKENS]  # each layout pads the vocabulary in its own way
    error = float((found - expected).abs().max())
    assert error < 1e-5, f"{what} differ by {error}, of at most {float(expected.abs().max())}"
    if dist.get_rank() == dist.get_world_size() - 1:
        print(f"EQUAL {what} {error:.1e}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for one in CASES[dist.get_world_size()]:
        check(one, folder)
    dist.destroy_process_group()
