"""`Reference`: the frozen policy that KL penalties are measured against.

`Reference(actor)` keeps a copy of the actor's weights as they are now, and puts it into the actor's own model for its
forward passes: no second model is built, and it works for any model that the actor works for. Where the actor trains
adapters (`EngineConfig.lora`) nothing is copied: the reference is the actor's model with its adapters off.
`Reference(model=...)` builds its own model, for a reference of another origin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.dataflow import Stage
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.build import build_engine, needs_vocab
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.forward_only import forward_only
from megatron_rl.workers.job_context import role_context
from megatron_rl.workers.outputs import logprob_output


class Reference:
    """A frozen policy.

    Args:
        model: an `Actor` (its present weights are copied; with LoRA: its frozen weights are used), or what an `Actor`
            takes as its model.
        tokenizer: needed for Megatron chunks, whose logical vocabulary is its length.
        parallel_state, parallel, context: as for `Actor`, when ``model`` is not one.
        config: a `Reference.Config`, or its fields by name, when ``model`` is not an `Actor`.
        offload: keep the copy in host memory and bring it to the device only for forward passes (with an `Actor`).

    Raises:
        ConfigError: layout, model and config do not fit together.
    """

    Config = EngineConfig

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        parallel_state: Any = None,
        parallel: ParallelSizes | None = None,
        context: ParallelContext | None = None,
        config: EngineConfig | Mapping[str, Any] | None = None,
        offload: bool = False,
    ) -> None:
        self._frozen: dict[str, Tensor] | None = None
        self._lends_base = False
        if isinstance(model, Actor):
            self.engine = model.engine
            self._lends_base = bool(self.engine.adapters)
            self._frozen = None if self._lends_base else copy_weights(self.engine, offload)
            return
        if tokenizer is None and needs_vocab(model):
            raise ConfigError("Reference of Megatron chunks needs the tokenizer: its length is the logical vocabulary")
        config = EngineConfig.of(config, "Reference")
        place = role_context(model, context, parallel_state, parallel, config.seed)
        vocab = 0 if tokenizer is None else len(tokenizer)
        self.engine = build_engine(model, place, config, name="reference", vocab=vocab, frozen=True)

    @property
    def context(self) -> ParallelContext:
        return self.engine.context

    def logprobs(self, write: str = "ref_logprobs") -> Stage:
        """A stage that writes log-probabilities of the response's tokens under the frozen weights, fp32
        ``[num_tokens]``; of all tokens where the batch has no ``response_mask``."""

        def run(batch: Any) -> None:
            with self.in_place():
                batch.tokens[write] = forward_only(self.engine, batch, logprob_output)

        at = self.context
        return Stage("reference.logprobs", run, ("input_ids",), (write,), place=str(at.sizes), agreement=at.agreement)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the shared model computes with the frozen weights; afterwards with its own again."""
        if self._frozen is None:
            with self.engine.base() if self._lends_base else contextlib.nullcontext():
                yield
            return
        with self.engine.holding(self._frozen):
            yield

    def state(self) -> dict[str, Tensor] | None:
        """This rank's frozen shards for a checkpoint; None when the reference has its own model
        or uses the actor's frozen weights."""
        return self._frozen

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert self._frozen is not None, "a reference with its own model has no state to restore"
        for name, tensor in state.items():
            self._frozen[name].copy_(tensor)


def copy_weights(engine: TrainingEngine, offload: bool) -> dict[str, Tensor]:
    """A copy of this rank's shards, in host memory when ``offload``."""
    engine.sync_parameters()
    return {name: (t.cpu().clone() if offload else t.clone()) for name, t in engine.tensors().items()}
