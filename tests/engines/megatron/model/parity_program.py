"""Four ranks: real models in many layouts, filled from Hugging Face folders, against `transformers`.

For each case: the layout names each rank's parameters as the model does, logits through Megatron's pipeline schedule
equal transformers', and a folder saved from there holds the original bits.

usage: parity_program.py FOLDER   (with one saved model per sub-folder name in CASES)
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_rl  # noqa: F401  (installs the CPU face before megatron.core is imported)

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_rl.engines.conversion import convert
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors, naming_of
from megatron_rl.models import Architecture, megatron_layout
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelSizes
from megatron_rl.parallel.context import ParallelContext
from megatron_rl.weights.hf_in import load_folder, read_architecture
from megatron_rl.weights.hf_out import save_hf

CASES = [
    ("llama", ParallelSizes(tp=4)),
    ("llama", ParallelSizes(tp=2, pp=2, sequence_parallel=True)),
    ("llama", ParallelSizes(pp=2, vpp=2)),
    ("qwen2", ParallelSizes(tp=2, pp=2)),
    ("qwen2", ParallelSizes(pp=4)),
    ("qwen3", ParallelSizes(tp=4)),  # more ranks than key/value heads
    ("qwen3", ParallelSizes(tp=2, pp=2, vpp=2)),
    ("qwen3_moe", ParallelSizes(ep=4)),
    ("qwen3_moe", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("qwen3_moe", ParallelSizes(tp=2, ep=2, etp=2, sequence_parallel=True)),
    ("mistral", ParallelSizes(tp=4)),
    ("mistral", ParallelSizes(tp=2, pp=2, sequence_parallel=True)),
    ("mixtral", ParallelSizes(ep=4)),
    ("mixtral", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("qwen2_moe", ParallelSizes(ep=4)),
    ("qwen2_moe", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("glm4_moe", ParallelSizes(ep=4)),
    ("glm4_moe", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("deepseek_v3", ParallelSizes(ep=4)),
    ("deepseek_v3", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("deepseek_v3", ParallelSizes(pp=2, vpp=2)),
    ("deepseek_v2", ParallelSizes(tp=4, sequence_parallel=True)),
    ("seeded", ParallelSizes(tp=2, pp=2)),  # tests/seeded_model.py: 5 layers over 2 stages
    ("stories", ParallelSizes(tp=2, pp=2)),  # real weights, where they are at hand
]
CONVERSIONS = [
    ("llama", ParallelSizes(pp=2, vpp=2)),
    ("qwen3_moe", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("mixtral", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
    ("glm4_moe", ParallelSizes(pp=2, vpp=2)),
    ("deepseek_v3", ParallelSizes(tp=2, ep=2, pp=2, sequence_parallel=True)),
]
TOKENS = 16


def pipeline_logits(chunks: list, context: ParallelContext, ids: Tensor, vocab: int) -> Tensor | None:
    """[1, tokens, vocab] on the ranks of the last stage."""
    found: list[Tensor] = []

    def step(_, chunk):
        logits = chunk(ids, torch.arange(ids.shape[1])[None], None)
        return logits, lambda output, non_loss_data=False: found.append(output.detach().clone()) or output

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks),
            model=chunks,
            num_microbatches=context.sizes.pp,
            seq_length=ids.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not context.is_last_stage:
        return None
    parts = [torch.empty_like(found[-1]) for _ in range(context.sizes.tp)]
    dist.all_gather(parts, found[-1].contiguous(), group=context.tp_group)
    return torch.cat(parts, dim=-1)[..., :vocab]


def check(architecture: Architecture, folder: Path, sizes: ParallelSizes, expected: Tensor, ids: Tensor) -> None:
    ParallelContext.forget()
    context = ParallelContext.create(sizes, timeout=120, seed=1)
    config = transformer_config(architecture, sizes)
    chunks = build_model(architecture, config, pg_collection=context.collection)
    vocab = padded_vocab(architecture.vocab, sizes.tp)
    tensors = chunk_tensors(chunks)
    layout = megatron_layout(architecture, context.grid, vocab, naming_of(chunks))
    shapes = {shard.name: shard.shape for shard in layout.shards(context.rank)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    load_folder(folder, layout, context.rank, tensors)
    logits = None
    if sizes.etp == 1:  # tensor-parallel experts gather uneven pieces, which gloo cannot do
        logits = pipeline_logits([chunk.eval() for chunk in chunks], context, ids, architecture.vocab)
    error = 0.0
    if logits is not None:
        error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert error <= 1e-5, f"{folder.name} {sizes}: logits differ by {error}"
    save_hf(layout, tensors, architecture, folder / "saved", rank=context.rank, max_shard_bytes=30_000)
    if context.rank == 0:
        assert_same_files(folder, folder / "saved")
        shutil.rmtree(folder / "saved")
    dist.barrier()
    assert not math.isnan(error), f"{folder.name} {sizes}: logits that are no numbers"


def there_and_back(folder: Path, sizes: ParallelSizes) -> None:
    """To a Megatron checkpoint written in ``sizes``, and back to a Hugging Face folder written by all ranks: fp32 norms
    and routers beside bf16 weights."""
    ParallelContext.forget()
    mixed, checkpoint, back = folder / "mixed", folder / "checkpoint", folder / "back"
    if dist.get_rank() == 0:
        mixed.mkdir()
        shutil.copy(folder / "config.json", mixed)
        save_file(mixed_dtypes(read_files(folder)), mixed / "model.safetensors", {"format": "pt"})
    dist.barrier()
    convert(mixed, checkpoint, "megatron", sizes)
    ParallelContext.forget()
    convert(checkpoint, back, "hf", max_shard_bytes=30_000)
    assert_same_files(mixed, back)
    dist.barrier()


def mixed_dtypes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = ("norm.weight", "gate.weight", "correction_bias")
    return {name: tensor if name.endswith(kept) else tensor.bfloat16() for name, tensor in tensors.items()}


def read_files(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_files(expected: Path, found: Path) -> None:
    original, saved = read_files(expected), read_files(found)
    assert sorted(saved) == sorted(original)
    assert [saved[name].dtype for name in original] == [tensor.dtype for tensor in original.values()]
    assert all(torch.equal(saved[name], original[name]) for name in original)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    context = ParallelContext.create(ParallelSizes(), timeout=120, seed=1)
    for name, sizes in CASES:
        folder = root / name
        if not folder.is_dir():
            continue
        architecture = read_architecture(folder)
        ids = torch.randint(3, architecture.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        check(architecture, folder, sizes, expected, ids)
        if context.rank == context.world_size - 1:  # of the last stage in every layout
            print(f"parity {name} {sizes}", flush=True)
    for name, sizes in CONVERSIONS:
        there_and_back(root / name, sizes)
        if context.rank == context.world_size - 1:
            print(f"converted {name} {sizes}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
