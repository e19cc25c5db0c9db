"""What a module does with the hidden states of its decoder: a linear layer, perhaps scaled, or more than that.

Log-probabilities under a linear output layer are taken from hidden states and its weight, a few tokens at a time
(`ops.token_logprobs`). Where the module does more (a bias, a cap on logits) its own ``forward`` computes them, for a
few tokens at a time too, and again in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from megatron_rl.config import ConfigError
from megatron_rl.ops.token_logprobs import from_logits, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 512  # whose logits exist at once where the module computes them


class Decoded(BaseModelOutputWithPast):
    """Hidden states in place of a decoder's result; of whatever else a module looks for there is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Head:
    """The output layer of a causal language model.

    Args:
        module: need not have weights yet.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.layer: nn.Module = module.get_output_embeddings()
        if self.layer is None or decoder_of(module) is module:
            raise ConfigError(
                f"{type(module).__name__} has no output layer apart from its decoder: give a causal language model of "
                "transformers"
            )
        self.scale = _scale(module, self.layer)  # of the logits; None: the module computes them

    def token_logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `TrainingEngine.token_logprobs`; the layer's parameters must be gathered."""
        if self.scale is not None:
            weight: Any = self.layer.weight
            return token_logprobs(
                hidden, weight, labels, temperature=temperature / self.scale, with_entropy=with_entropy
            )
        parts = zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
        found = [
            checkpoint(self._chunk, part, own, temperature, with_entropy, use_reentrant=False) for part, own in parts
        ]
        logprobs = torch.cat([chunk[0] for chunk in found])
        return logprobs, torch.cat([chunk[1] for chunk in found]) if with_entropy else None

    def _chunk(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.logits(hidden[None])[0]
        return from_logits(logits, labels, temperature=temperature, with_entropy=with_entropy)

    def logits(self, hidden: Tensor) -> Tensor:
        """The module's own for hidden states ``[rows, n, hidden]`` of its decoder."""
        with standing_in(decoder_of(self.module), Decoded(last_hidden_state=hidden)):
            return _logits(self.module, hidden)


def decoder_of(module: PreTrainedModel) -> nn.Module:
    """The part of a module that ends with the hidden states."""
    return module.base_model


@contextlib.contextmanager
def standing_in(layer: nn.Module, result: Any) -> Iterator[list[Any]]:
    """While open, ``layer`` returns ``result``; yields a list of the first arguments that it is called with."""
    seen: list[Any] = []

    def forward(*given: Any, **named: Any) -> Any:
        seen.append(given[0] if given else None)
        return result

    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del layer.forward


def _logits(module: PreTrainedModel, hidden: Tensor) -> Tensor:
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    found: Tensor = type(module).forward(module, input_ids=ids, use_cache=False).logits  # type: ignore[arg-type]
    return found


def _scale(module: PreTrainedModel, layer: nn.Module) -> float | None:
    """By what the module multiplies the output of a linear layer without bias over the unchanged hidden states; None
    where it does anything else. Neither decoder nor layer is computed: known values stand in for their results."""
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        return None
    hidden = torch.linspace(-2, 2, 2 * layer.in_features).view(1, 2, -1)
    values = torch.linspace(-60, 60, 2 * layer.out_features).view(1, 2, -1)
    with (
        torch.no_grad(),
        standing_in(decoder_of(module), Decoded(last_hidden_state=hidden)),
        standing_in(layer, values) as seen,
    ):
        logits = _logits(module, hidden)
    if len(seen) != 1 or not torch.equal(seen[0], hidden) or logits.shape != values.shape:
        return None
    scale = float(logits[0, 1, -1].double() / values[0, 1, -1].double())
    return scale if scale > 0 and torch.allclose(logits, values * scale, rtol=1e-6, atol=0.0) else None
