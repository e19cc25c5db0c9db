"""`TorchEngine`: a second engine behind the face of `engines/base.py`: plain torch, one rank, a `transformers` model, a
torch optimizer. It proves that the roles know no backend; it is no product.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_rl.batch import Batch
from megatron_rl.data.packing import MicroBatch
from megatron_rl.engines.base import MicroBatching, Origin, Output, TrainingEngine
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.models import transformers_layout
from megatron_rl.models.hf_config import best_architecture
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout, WireFormat


class TorchEngine(TrainingEngine):
    """A causal language model of `transformers` on one rank, in padded rows.

    Args:
        model: is trained in place.
        rows: sequences of a micro-batch.
    """

    def __init__(
        self, model: PreTrainedModel, context: ParallelContext, optimizer: OptimizerConfig, rows: int | None = None
    ) -> None:
        assert context.world_size == 1, "this engine knows one rank"
        self.model = model
        self.context = context
        self.architecture = best_architecture(model.config)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.origin = Origin(hf_config=model.config, dtypes=WireFormat(model.dtype))
        self.micro_batching = MicroBatching(packing=False, rows=rows)
        self.clip = optimizer.clip_gradient
        if optimizer.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=optimizer.learning_rate)
        else:
            self.optimizer = torch.optim.AdamW(
                model.parameters(),
                lr=optimizer.learning_rate,
                betas=(optimizer.beta1, optimizer.beta2),
                eps=optimizer.epsilon,
                weight_decay=optimizer.weight_decay,
            )

    # What the model is, and its weights

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def packs(self) -> bool:
        return False

    @property
    def layout(self) -> Layout:
        return transformers_layout(self.architecture)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def sync_parameters(self) -> None:
        """Nothing is ever under way."""

    # Computing

    @torch.no_grad()
    def forward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        self.model.eval()
        return [output(micro_batch, self._hidden(batch, micro_batch)) for micro_batch in micro_batches]

    def forward_backward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        self.model.train()
        self.optimizer.zero_grad()
        results = []
        for micro_batch in micro_batches:
            loss, result = output(micro_batch, self._hidden(batch, micro_batch))
            loss.backward()
            results.append(result)
        return results

    def _hidden(self, batch: Batch, micro_batch: MicroBatch) -> Tensor:
        """Logits in place of hidden states: the whole model's, whatever it does with these. Padding stands behind each
        sequence, where causal attention does not see it."""
        places = micro_batch.position_ids.view(micro_batch.rows, micro_batch.columns)
        given = {"position_ids": places} if self.takes_positions else {}
        found = self.model(input_ids=micro_batch.input_ids(batch), use_cache=False, **given)
        return found.logits.flatten(0, 1)

    def token_logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = (hidden.float() / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, labels[:, None]).squeeze(-1)
        return chosen, -(logprobs.exp() * logprobs).sum(-1) if with_entropy else None

    # Optimising

    def largest_gradient(self) -> float:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return max(float(gradient.abs().max()) for gradient in gradients)

    def step(self) -> float | None:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        self.num_steps += 1
        return float(norm)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    # Checkpoints

    def state(self, prefix: str = "", loading: bool = False) -> dict[str, Any]:
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "counters": {"num_steps": self.num_steps},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps = state["counters"]["num_steps"]
