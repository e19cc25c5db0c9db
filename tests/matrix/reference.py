"""What `transformers` computes of the entries of `families.FAMILIES`, written beside their folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from families import seeded_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LEARNING_RATE = 0.01
LENGTHS = (24, 9, 17, 5)  # of the sequences of one step; the first also gives the logits


def slug(name: str) -> str:
    return re.sub("[^a-z0-9_]+", "-", name)


def write(root: Path, name: str, config: PretrainedConfig) -> None:
    """The seeded model as ROOT/<slug>, and tensors of `Expected` in ROOT/<slug>.expected."""
    model = seeded_model(config)
    model.save_pretrained(root / slug(name))
    ids = torch.randint(3, config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = model(ids[None, : LENGTHS[0]]).logits
    stepped = {f"stepped.{key}": value for key, value in step(model, ids).items()}
    save_file({"ids": ids, "logits": logits, **stepped}, (root / slug(name)).with_suffix(".expected"))


def step(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Trained weights, as files name them, after one step of gradient descent on the mean log-probability."""
    model.train()
    total = torch.zeros(())
    for row in ids.split(LENGTHS):
        logprobs = model(row[None]).logits[0, :-1].log_softmax(-1)
        total = total - logprobs.gather(-1, row[1:, None]).sum()
    (total / (sum(LENGTHS) - len(LENGTHS))).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= LEARNING_RATE * parameter.grad
    return saved_tensors(model)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters under the names that `save_pretrained` gives them."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found: dict[str, Tensor] = {}
        for file in Path(folder).glob("*.safetensors"):
            found |= load_file(file)
    return found


class Expected:
    """What `write` wrote."""

    def __init__(self, folder: Path, ids: Tensor, logits: Tensor, **stepped: Tensor) -> None:
        self.folder, self.all_ids, self.logits = folder, ids, logits
        self.ids = ids[None, : LENGTHS[0]]
        self.stepped = {key.removeprefix("stepped."): value for key, value in stepped.items()}
        self.num_predicted = sum(LENGTHS) - len(LENGTHS)

    def rows(self) -> list[list[int]]:
        return [row.tolist() for row in self.all_ids.split(LENGTHS)]

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()

    def logprob_error(self, prompts: Sequence[list[int]], completions: Sequence[Sequence]) -> float:
        """Largest difference between the log-probabilities of completions and a forward pass of the whole text."""
        error = 0.0
        for prompt, samples in zip(prompts, completions, strict=True):
            for sample in samples:
                with torch.no_grad():
                    logits = self.model(torch.tensor([prompt + list(sample.token_ids)])).logits[0]
                tokens = torch.tensor(sample.token_ids)[:, None]
                exact = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens)[:, 0]
                error = max(error, float((exact - torch.as_tensor(sample.logprobs)).abs().max()))
        return error
