"""Small random models and batches from fixed seeds, the same for every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layouts import logical_tensors
from megatron_rl.models.parameters import whole
from megatron_rl.parallel import ParallelContext
from megatron_rl.weights.hf_folder import HFDescription, HFFolderWriter
from megatron_rl.weights.source import SafetensorsFolder

VOCAB = 64
TEMPERATURE = 0.9
NUM_GROUPS, GROUP_SIZE, NUM_PAIRS = 4, 3, 4
INITIAL_STD = 0.08
WINDOW = 6  # of models with a sliding window: some sequences are longer
PLAIN = Architecture("llama", 4, 32, 64, 4, 2, 8, VOCAB, tied=False, max_positions=128)


class NumberTokenizer:
    """The tokenizer methods that workers use, for a vocabulary of numbers."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __len__(self) -> int:
        return VOCAB

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def shrunk(architecture: Architecture) -> Architecture:
    """The same kind of decoder, as small as two ranks of each axis, and two chunks a stage, allow."""
    experts = architecture.experts and replace(
        architecture.experts, num_experts=4, experts_per_token=2, ffn=32, dense_layers=()
    )
    return replace(
        PLAIN,
        family=architecture.family,
        tied=architecture.tied,
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        experts=experts,
        window=architecture.window and min(architecture.window, WINDOW),
        full_layers=architecture.full_layers and (0,),
    )


def write_random_model(folder: Path, architecture: Architecture, seed: int) -> Path:
    """A Hugging Face folder with random weights, norms around 1; of a classifier where it has a value head."""
    generator = torch.Generator().manual_seed(seed)
    writer = HFFolderWriter(folder, HFDescription(architecture), torch.float32)
    writer.begin()
    for file in writer.files:
        tensors = {name: torch.randn(shape, generator=generator) * INITIAL_STD for name, shape in file.tensors.items()}
        writer.write(file, {name: t + 1.0 if "norm" in name else t for name, t in tensors.items()})
    writer.commit()
    return folder


def read_model(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """All logical tensors of a Hugging Face folder."""
    with SafetensorsFolder(folder) as source:
        shards = [whole(name, name, shape) for name, shape in logical_tensors(architecture).items()]
        return {shard.name: source.read(shard.spans[0]) for shard in shards}


def own_part(rows: list, context: ParallelContext) -> list:
    """This data-parallel rank's contiguous part."""
    size = len(rows) // context.dp_size
    return rows[context.coordinates.dp * size : (context.coordinates.dp + 1) * size]


def sampled_batch(context: ParallelContext) -> Batch:
    """Groups of unequal responses, one of a single token, some with observations in their middle; the rewards of one
    group are all equal."""
    generator = torch.Generator().manual_seed(11)
    samples = []
    for group in range(NUM_GROUPS):
        prompt = Prompt(_tokens(generator, 3 + group), index=group)
        for number in range(GROUP_SIZE):
            length = 1 if (group, number) == (1, 0) else int(torch.randint(2, 14, (1,), generator=generator))
            mask = [0 if length > 6 and 2 <= t < 4 else 1 for t in range(length)]
            logprobs = (-4.0 - 0.3 * torch.rand(length, generator=generator)).tolist()
            reward = 0.5 if group == 2 else float(torch.rand((), generator=generator))
            samples.append(Sample(prompt, _tokens(generator, length), logprobs, "", mask, group=group, reward=reward))
    batch = Batch(samples=own_part(samples, context), temperature=TEMPERATURE)
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples])
    return batch


def fixed_batch(context: ParallelContext) -> Batch:
    """Preference pairs, chosen first, with labels and margins."""
    generator = torch.Generator().manual_seed(23)
    rows = []
    for pair in range(NUM_PAIRS):
        prompt = _tokens(generator, 2 + pair)
        for _ in range(2):
            response = _tokens(generator, int(torch.randint(1, 14, (1,), generator=generator)))
            rows.append((prompt, response, 0.25 * pair))
    rows = own_part(rows, context)
    batch = Batch.from_sequences([p + r for p, r, _ in rows], [[0] * len(p) + [1] * len(r) for p, r, _ in rows])
    batch.sequences["labels"] = torch.arange(len(rows)) % 2 == 0
    batch.sequences["groups"] = torch.arange(len(rows)) // 2 + context.coordinates.dp * len(rows)
    batch.sequences["margins"] = torch.tensor([margin for _, _, margin in rows])
    return batch


def _tokens(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()
