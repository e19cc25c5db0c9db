"""The proof that a job's model is the one that we export: one short forward, compared layer by layer.

Every layer of the chunks is fed by the layer before it, as always; its input and output are kept, and `transformers`
computes the same layer from the same input and the exported weights. So the first layer that differs is named, and no
more than one layer is held twice. Where the model is large only some layers are compared, and the log says which.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import MicroBatch
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import MicroBatching
from megatron_rl.engines.megatron.engine import MegatronEngine
from megatron_rl.engines.megatron.model.core_attention import zigzag_order
from megatron_rl.engines.megatron.model.decoder_layers import decoder_layers
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.engines.micro_batches import plan_micro_batches
from megatron_rl.models.family import describe
from megatron_rl.models.layouts import EVERYWHERE, logical_tensors
from megatron_rl.models.parameters import whole
from megatron_rl.models.pipeline import stage_layers
from megatron_rl.models.reference_layer import ReferenceLayer
from megatron_rl.reshard import Layout, LocalTransport, P2PTransport, Resharder
from megatron_rl.reshard.layout import restricted
from megatron_rl.weights.fill import empty_tensors

logger = logging.getLogger(__name__)

TOKENS = 48  # of the sequence, rounded up to what the layout can split
ALL_LAYERS_BYTES = 1 << 30  # models up to this size in fp32 are compared whole
PART_BYTES = 2 << 30  # a layer, embedding or output layer above this size in fp32 is not compared
# Largest relative error of a part (L2 over the sequence). Right models on this grid stay below a tenth of each; the
# smallest wrong one that we know (Llama 3's RoPE scaling taken for none) is at 3e-3 in fp32.
TOLERANCE = {torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, slots=True)
class Finding:
    """How far one part of the model is from the export's."""

    order: int  # in the forward pass
    part: str  # for people
    error: float  # relative


def prove(model: MegatronEngine, packing: bool) -> list[Finding]:
    """Compare the chunks with their exported description; collective over all ranks.

    The model, its training mode and random states are left unchanged.

    Raises:
        ConfigError: a part differs; the message names the first one.
    """
    platform = current_platform()
    state, training = platform.rng_state(), [chunk.training for chunk in model.chunks]
    try:
        with torch.no_grad():
            findings = _compare(model, packing)
    finally:
        platform.set_rng_state(state)
        for chunk, mode in zip(model.chunks, training, strict=True):
            chunk.train(mode)
    limit = TOLERANCE[model.dtype]
    wrong = [finding for finding in findings if not finding.error <= limit]
    if wrong:
        first = min(wrong, key=lambda finding: finding.order)
        raise ConfigError(
            f"{first.part} of this Megatron model computes something else than the {model.architecture.family} model "
            f"it would be exported as: relative difference {first.error:.2g}, of which {limit:.0e} could be rounding. "
            "Rollouts and exports would run another model than the one that trains. Look for modules or settings of "
            "your own in that part (docs/megatron_lm.md lists what is supported)"
        )
    return findings


def _compare(model: MegatronEngine, packing: bool) -> list[Finding]:
    batch = _sequence(model)
    capture = _Capture(model)
    model.sync_parameters()

    def output(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if model.value_model:
            return hidden, None
        labels = micro_batch.labels(batch).to(hidden.device)
        return hidden, model.token_logprobs(hidden, labels, temperature=1.0, with_entropy=False)[0]

    with capture.hooked():
        micro_batches = plan_micro_batches(batch, model, how=MicroBatching(2**30, packing, 1))
        results = model.forward(batch, micro_batches, output)
    found = _Parts(model, batch, capture)
    findings = found.embedding()
    for index in layers_to_compare(model):
        findings += found.layer(index)
    if results and results[0][1] is not None:
        capture.final = capture.whole(results[0][0].unsqueeze(1))
        capture.logprobs = capture.whole(results[0][1].view(-1, 1, 1))
    findings += found.output() if not model.value_model else []
    return [finding for part in model.context.gather_objects(findings) for finding in part]


def layers_to_compare(model: MegatronEngine) -> list[int]:
    """All layers of a small model; of a large one the first, the last, one in the middle and the first of each kind."""
    architecture = model.architecture
    shapes = logical_tensors(architecture)
    if 4 * sum(math.prod(shape) for shape in shapes.values()) <= ALL_LAYERS_BYTES:
        return list(range(architecture.num_layers))
    last = architecture.num_layers - 1
    dense = architecture.experts.dense_layers if architecture.experts else ()
    routed = [index for index in range(last) if index not in dense]
    some = sorted({0, last, last // 2, *dense[:1], *routed[:1]})
    logger.info("the model is compared with its export in layers %s only, as it is large", some)
    return some


def _sequence(model: MegatronEngine) -> Batch:
    """One sequence of random tokens, the same on every rank, that the layout splits without padding."""
    sizes = model.context.sizes
    multiple = 2 * sizes.cp * sizes.tp
    count = -(-TOKENS // multiple) * multiple
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(max(2, model.architecture.vocab), (count,), generator=generator).tolist()
    return Batch.from_sequences([tokens], [[1] * count])


class _Capture:
    """Input and output of this rank's layers, by index in the whole model, as each rank computed them."""

    def __init__(self, model: MegatronEngine) -> None:
        self.model = model
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.final: Tensor | None = None  # [tokens, hidden], what goes into the output layer
        self.logprobs: Tensor | None = None  # [tokens, 1]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        layers = [layer for chunk in self.model.chunks for layer in decoder_layers(unwrap(chunk))]
        handles = [
            handle
            for layer in layers
            for handle in (
                layer.attention.register_forward_pre_hook(partial(self._keep_input, layer.index), with_kwargs=True),
                layer.feed_forward.register_forward_hook(partial(self._keep_output, layer.index)),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_input(self, index: int, module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if index not in self.inputs:  # an interleaved pipeline runs several micro-batches
            self.inputs[index] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach().clone()

    def _keep_output(self, index: int, module: Any, args: tuple, result: Any) -> None:
        if index not in self.outputs:
            self.outputs[index] = (result[0] if isinstance(result, tuple) else result).detach().clone()

    def whole(self, local: Tensor) -> Tensor:
        """``[tokens, ..]`` fp32 of the first sequence, from ``[positions, rows, ..]`` of every rank that shares it.
        Collective over tensor parallelism (where sequences are split) and context parallelism."""
        context = self.model.context
        local = local[:, :1].float()
        if self.model.config.sequence_parallel and context.sizes.tp > 1 and local.shape[0] < self._positions():
            local = _gathered(local, context.tp_group)
        if context.sizes.cp > 1:
            order = zigzag_order((local.shape[0],), context.sizes.cp, local.device)
            local = _gathered(local, context.cp_group).index_select(0, order)
        return local.squeeze(1)

    def _positions(self) -> int:
        """Positions of one context-parallel rank before sequence parallelism."""
        return _sequence(self.model).num_tokens // self.model.context.sizes.cp


class _Parts:
    """The comparisons. Each is collective over all ranks; the rank that owns the part reports it."""

    def __init__(self, model: MegatronEngine, batch: Batch, capture: _Capture) -> None:
        self.model, self.capture = model, capture
        self.tokens = batch.tokens["input_ids"].to(model.device)
        self.shapes = logical_tensors(model.architecture)
        self._description = describe(model.architecture)
        single = not dist.is_initialized() or dist.get_world_size() == 1
        self._transport = LocalTransport() if single else P2PTransport()
        grid = model.context.grid
        self._owners = [min(grid.ranks(pp=stage)) for stage in range(grid.sizes.pp)]

    def embedding(self) -> list[Finding]:
        name = self._description.embedding.hf
        if self._is_large([name]):
            return []
        hidden = self._whole_of(self.capture.inputs, 0)
        weights = self._fetch(self._plain([name], self._owners[0]))
        if hidden is None or not weights:
            return []
        return [Finding(-1, "the embedding", _error(hidden, weights[name][self.tokens]))]

    def layer(self, index: int) -> list[Finding]:
        reference = ReferenceLayer(self.model.architecture, index)
        stage = self._stage(index)
        layout = reference.layout(self._owners[stage])
        if self._is_large({span.tensor for shard in layout.shards(self._owners[stage]) for span in shard.spans}):
            logger.info("layer %d is not compared with its export: it is too large to be held twice", index)
            return []
        before, after = (self._whole_of(kept, index) for kept in (self.capture.inputs, self.capture.outputs))
        weights = self._fetch(layout)
        if before is None or after is None or not weights:
            return []
        expected = reference.run(weights, before)
        found = F.rms_norm(after, after.shape[-1:], eps=self.model.architecture.norm_eps)
        return [Finding(index, f"layer {index}", self._layer_error(index, found, expected))]

    def output(self) -> list[Finding]:
        """Final norm and output layer, by the log-probabilities of the sequence's own tokens."""
        names = [self._description.final_norm.hf, self._description.output.hf]
        if self._is_large(names):
            return []
        last = self.model.architecture.num_layers - 1
        hidden = self._whole_of(self.capture.outputs, last)
        weights = self._fetch(self._plain(names, self._owners[-1]))
        if hidden is None or not weights or self.capture.final is None or self.capture.logprobs is None:
            return []
        normed = F.rms_norm(hidden, hidden.shape[-1:], weights[names[0]], self.model.architecture.norm_eps)
        findings = [Finding(last + 1, "the final norm", _error(self.capture.final, normed))]
        expected = torch.log_softmax(self.capture.final[:-1] @ weights[names[1]].T, -1)
        chosen = expected.gather(1, self.tokens[1:, None])
        return [*findings, Finding(last + 2, "the output layer", _error(self.capture.logprobs[:-1], chosen))]

    def _layer_error(self, index: int, found: Tensor, expected: Tensor) -> float:
        """Of a layer with experts the upper quartile over tokens: rounding may send a token to another expert."""
        experts = self.model.architecture.experts
        if experts is None or index in experts.dense_layers:
            return _error(found, expected)
        each = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        return float(each.quantile(0.75))

    def _stage(self, index: int) -> int:
        sizes, count = self.model.context.sizes, self.model.architecture.num_layers
        places = itertools.product(range(sizes.pp), range(sizes.vpp))
        return next(pp for pp, chunk in places if index in stage_layers(count, sizes.pp, sizes.vpp, pp, chunk))

    def _whole_of(self, kept: Mapping[int, Tensor], index: int) -> Tensor | None:
        return self.capture.whole(kept[index]) if index in kept else None

    def _is_large(self, names: Sequence[str] | set[str]) -> bool:
        return 4 * sum(math.prod(self.shapes[name]) for name in names) > PART_BYTES

    def _plain(self, names: Sequence[str], owner: int) -> Layout:
        return Layout(
            "parts", {owner: EVERYWHERE}, lambda replica: [whole(name, name, self.shapes[name]) for name in names]
        )

    def _fetch(self, target: Layout) -> dict[str, Tensor]:
        """The tensors of ``target`` that this rank holds there, fp32."""
        rank, model = self.model.context.rank, self.model
        wanted = {
            span.tensor for replica in target.replicas for shard in target.shards_of(replica) for span in shard.spans
        }
        filled = empty_tensors(target, rank, torch.float32, model.device)
        source = restricted(model.layout, wanted)
        Resharder(source, target, rank, self._transport, torch.float32).run(model.published(), filled)
        return filled


def _gathered(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
