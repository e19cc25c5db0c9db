"""A converted checkpoint is what Megatron-Core itself saves of the model; its `dist_checkpointing` is the oracle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from families import FAMILIES, seeded_model
from safetensors.torch import load_file

import megatron_rl
from megatron_rl.engines.conversion import convert
from megatron_rl.engines.megatron.checkpoint.writer import CheckpointWriter
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors, naming_of, unwrap
from megatron_rl.models.layouts import megatron_layout
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.models.stored_tensors import are_stacked
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.reshard.rectangle import Rectangle
from megatron_rl.weights.fill import fill
from megatron_rl.weights.opened_weights import open_weights

assert megatron_rl  # installs the CPU face before megatron.core is imported

LAYOUTS = [ParallelSizes(), ParallelSizes(tp=2, pp=2), ParallelSizes(tp=2, pp=2, ep=2)]
NAMES = ("llama, tied, llama3 positions", "gemma3_text", "qwen2_moe", "glm4_moe", "gpt_oss", "deepseek_v3")


def save_by_megatron_core(folder: Path, target: Path, tp: int) -> None:
    """Build the model on one rank, fill it, and let Megatron-Core save it."""
    context = ParallelContext.create(ParallelSizes())
    with open_weights(folder) as opened:
        a = opened.description.architecture
        frequency = {"moe_layer_freq": 1} if a.experts is not None and are_stacked(a) else {}
        config = transformer_config(a, ParallelSizes(), dtype=torch.float32, **frequency)
        vocab = padded_vocab(a.vocab, tp)
        chunks = build_model(a, config, pg_collection=context.collection)
        layout = megatron_layout(a, context.grid, vocab, naming_of(chunks))
        fill(layout, 0, chunk_tensors(chunks), opened.tensors)
    writer = CheckpointWriter(target)
    request = writer.begin({"model": unwrap(chunks[0]).sharded_state_dict()})
    request.add_finalize_fn(writer.complete)
    request.execute_sync()


def contents(folder: Path) -> dict[str, torch.Tensor | None]:
    """Every tensor, whole, and None for every object, read by torch."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries.items() if hasattr(v, "size")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return dict.fromkeys(entries) | tensors


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_holds_what_megatron_core_saves(name, tmp_path) -> None:
    seeded_model(FAMILIES[name]).save_pretrained(tmp_path / "hf")
    save_by_megatron_core(tmp_path / "hf", tmp_path / "oracle", tp=1)
    expected = contents(tmp_path / "oracle")
    for number, sizes in enumerate(LAYOUTS):
        if sizes.ep > 1 and "experts" not in " ".join(expected):
            continue
        convert(tmp_path / "hf", tmp_path / f"{number}", "megatron", sizes)
        found = contents(tmp_path / f"{number}" / "release")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if value is not None:
                assert torch.equal(found[key], value), key


def test_a_file_for_each_rank_holds_its_part_only(tmp_path) -> None:
    """Vocabulary 250 is padded to 256; each of four ranks of TP2 PP2 gets half of one stage."""
    seeded_model(FAMILIES["llama"]).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m", "megatron", ParallelSizes(tp=2, pp=2))
    metadata = pickle.loads((tmp_path / "m" / "release" / ".metadata").read_bytes())
    files: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for index, stored in metadata.storage_data.items():
        files.setdefault(stored.relative_path, set()).add((index.fqn, tuple(index.offset or ())))
    assert sorted(files) == [f"__{rank}_0.distcp" for rank in range(4)]
    embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
    assert {at for at in files["__1_0.distcp"] if at[0] == embedding} == {(embedding, (128, 0))}
    assert {at for at in files["__2_0.distcp"] if at[0] == head} == {(head, (0, 0))}
    down = "decoder.layers.mlp.linear_fc2.weight"
    assert {at for at in files["__3_0.distcp"] if at[0] == down} == {(down, (2, 0, 48)), (down, (3, 0, 48))}


def test_parts_of_chunks_that_torch_saved_in_another_order_are_read_right(tmp_path) -> None:
    from megatron_rl.models.stored_chunks import StoredChunks

    wide = torch.randn(6, 10)
    state = {"turned": wide.t(), "part": wide[1:4], "strided": wide[:, 2:7], "flat": torch.arange(7.0), "int": wide}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    reader = dcp.FileSystemReader(tmp_path)
    metadata = reader.read_metadata()
    chunks = StoredChunks(tmp_path, metadata.state_dict_metadata, metadata.storage_data)
    for key, value in state.items():
        matrix = value if value.dim() > 1 else value[:, None]
        assert torch.equal(chunks.read(key, (), tuple(value.shape)), matrix)
        part = Rectangle(1, 3, 0, min(2, matrix.shape[1]))
        assert torch.equal(chunks.read(key, (), tuple(value.shape), part), matrix[1:3, : part.col_stop])


@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 1, 1)])
def test_a_streamed_file_is_the_one_that_safetensors_writes(tmp_path, sizes) -> None:
    from safetensors.torch import save_file

    from megatron_rl.models.safetensors_files import SafetensorsWriter

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {
        f"{'bca'[i]}.{j}é": torch.randn(sizes[i], 2 + j).to(dtypes[(i + j) % 3]) for i in range(3) for j in range(4)
    }
    save_file(tensors, tmp_path / "whole", {"format": "pt"})
    with SafetensorsWriter(tmp_path / "rows", {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}) as file:
        for name in file.names:
            for row in tensors[name]:
                file.write(row[None])
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(load_file(tmp_path / "rows")) == sorted(tensors)
    assert io.BytesIO((tmp_path / "rows").read_bytes()).read(8)
