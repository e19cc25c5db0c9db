"""The layouts of one model: Hugging Face's, Megatron's and SGLang's, all as data over the same logical tensors.

Each is a pure function of the architecture and the parallel sizes, so every rank computes any rank's part by itself.
Impossible sizes are refused here, before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.experts import ExpertMLP
from megatron_rl.models.description import ModelDescription
from megatron_rl.models.family import describe
from megatron_rl.models.module_architecture import ModuleArchitecture, held_of, logical_of
from megatron_rl.models.naming import MegatronNaming, chunk_prefix
from megatron_rl.models.parameters import Axis, Place, Shape, whole
from megatron_rl.models.pipeline import stage_layers
from megatron_rl.models.usual_shards import usual_shards
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import AS_IT_IS, Held, Layout, Shard, Symmetry

EVERYWHERE = "everywhere"  # the only replica of a layout in which all ranks hold the same


def logical_tensors(architecture: Architecture) -> dict[str, Shape]:
    """Names and shapes of the model's Hugging Face tensors; a tied model has no ``lm_head.weight``."""
    if isinstance(architecture, ModuleArchitecture):
        return logical_of(architecture.tensors)
    items = describe(architecture).parameters()
    return {prefix + name: shape for prefix, parameter in items for name, shape in parameter.logical()}


def hf_layout(architecture: Architecture, ranks: Iterable[int] = (0,)) -> Layout:
    """Each of ``ranks`` holds all logical tensors, as Hugging Face files store them."""
    tensors = logical_tensors(architecture)
    return Layout(
        "huggingface",
        dict.fromkeys(ranks, EVERYWHERE),
        lambda replica: [whole(name, name, shape) for name, shape in tensors.items()],
        held=_held(architecture, with_added=False),
    )


def transformers_layout(architecture: Architecture, ranks: Iterable[int] = (0,)) -> Layout:
    """Each of ``ranks`` holds a whole `transformers` model: as `hf_layout`, but experts are stacked."""
    if isinstance(architecture, ModuleArchitecture):
        whole_module = [tensor.shard for tensor in architecture.tensors]
        held = held_of(architecture.tensors)
        return Layout("transformers", dict.fromkeys(ranks, EVERYWHERE), lambda replica: whole_module, held=held)

    def emit(replica: Hashable) -> Iterator[Shard]:
        for prefix, parameter in describe(architecture).parameters():
            yield from parameter.transformers(Place(hf=prefix, local=prefix))

    return Layout("transformers", dict.fromkeys(ranks, EVERYWHERE), emit)


@dataclass(frozen=True, slots=True)
class MegatronReplica:
    """Ranks with equal indices hold the same parameters: data and context parallel ranks are replicas."""

    tp: int
    pp: int
    ep: int
    etp: int


def megatron_layout(
    architecture: Architecture,
    grid: RankGrid,
    padded_vocab: int,
    naming: MegatronNaming | None = None,
    output_layer: bool = True,
) -> Layout:
    """What each Megatron rank holds, named as `engines/megatron/model/model_chunk.py` names them.

    Args:
        padded_vocab: rows of Megatron's embedding over all tensor-parallel ranks.
        naming: the spelling of the model's layer spec; None is the local spec.
        output_layer: False for a model whose output layer is a value head, which has no logical tensor.

    Raises:
        ConfigError: the sizes do not fit the architecture.
    """
    sizes = grid.sizes
    check_megatron(architecture, sizes, padded_vocab)
    emit = _MegatronStage(architecture, sizes, padded_vocab, naming or MegatronNaming(), output_layer)
    mixes = architecture.experts is not None
    replica_of = {}
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        replica_of[rank] = MegatronReplica(at.tp, at.pp, at.ep if mixes else 0, at.etp if mixes else 0)
    return Layout(f"megatron {sizes}", replica_of, emit)


@dataclass(frozen=True)
class _MegatronStage:
    """Replica -> shards: the chunks of one pipeline stage, in order."""

    architecture: Architecture
    sizes: ParallelSizes
    padded_vocab: int
    naming: MegatronNaming
    output_layer: bool

    def __call__(self, replica: Hashable) -> Iterator[Shard]:
        assert isinstance(replica, MegatronReplica)
        for chunk in range(self.sizes.vpp):
            place = Place(
                local=chunk_prefix(chunk, self.sizes.vpp),
                tp=Axis(replica.tp, self.sizes.tp),
                ep=Axis(replica.ep, self.sizes.ep),
                expert_tp=Axis(replica.etp, self.sizes.etp),
                padded_vocab=self.padded_vocab,
                naming=self.naming,
            )
            yield from self._chunk(replica.pp, chunk, place)

    def _chunk(self, stage: int, chunk: int, place: Place) -> Iterator[Shard]:
        model, sizes = describe(self.architecture), self.sizes
        if stage == 0 and chunk == 0:
            yield from model.embedding.parameter().megatron(place)
        for local, index in enumerate(stage_layers(len(model.layers), sizes.pp, sizes.vpp, stage, chunk)):
            at = replace(place, hf=model.prefix(index), local=f"{place.local}decoder.layers.{local}.")
            for parameter in model.layers[index].parameters:
                yield from parameter.megatron(at)
        if stage == sizes.pp - 1 and chunk == sizes.vpp - 1:
            yield from model.final_norm_parameter.megatron(place)
            if self.output_layer and (not model.tied or sizes.pp > 1):
                yield from model.output.parameter().megatron(place)


def rollout_layout(architecture: Architecture, tp: int, replicas: Sequence[Sequence[int]], ep: int = 1) -> Layout:
    """What each rank of an SGLang engine (or of the local engine) holds, in SGLang's names; of a model without a family
    what SGLang's classes usually hold.

    Args:
        tp: tensor-parallel ranks of one engine.
        replicas: for each engine the global ranks that hold (or feed) its tensor-parallel ranks, in order.
        ep: expert-parallel ranks among the ``tp``.

    Raises:
        ConfigError: the sizes do not fit the architecture, or an engine has not ``tp`` ranks.
    """
    check_rollout(architecture, tp, ep)
    if isinstance(architecture, ModuleArchitecture):
        usual = usual_shards(logical_of(architecture.tensors), architecture.vocab)
        held = held_of(architecture.tensors)
        everywhere = dict.fromkeys((rank for ranks in replicas for rank in ranks), EVERYWHERE)
        return Layout("sglang, as usual", everywhere, lambda replica: usual, held=held)
    replica_of: dict[int, Hashable] = {}
    for ranks in replicas:
        if len(ranks) != tp:
            raise ConfigError(f"a rollout engine on ranks {list(ranks)} has {len(ranks)} ranks, expected tp={tp}")
        for index, rank in enumerate(ranks):
            if rank in replica_of:
                raise ConfigError(f"rank {rank} is in two rollout engines: give each rank to one engine")
            replica_of[rank] = index

    def emit(replica: Hashable, only: Collection[str] | None = None) -> Iterator[Shard]:
        assert isinstance(replica, int)
        expert_tp = tp // ep
        place = Place(
            tp=Axis(replica, tp),
            ep=Axis(replica // expert_tp, ep),
            expert_tp=Axis(replica % expert_tp, expert_tp),
            padded_vocab=rollout_vocab(architecture.vocab, tp),
        )
        for prefix, parameter in describe(architecture).parameters():
            if only is None or any(name.startswith(prefix) for name in only):
                yield from parameter.rollout(replace(place, hf=prefix, local=prefix))

    model = describe(architecture)
    symmetry = Symmetry(_RolloutKind(model, ep), emit)
    held = _held(architecture, with_added=True)
    recomputed = tuple(
        replace(tensor, name=model.prefix(index) + tensor.name, source=model.prefix(index) + tensor.source)
        for index, layer in enumerate(model.layers)
        for tensor in layer.recomputed
    )
    recomputed += model.final_recomputed
    return Layout(f"sglang TP{tp}" + (f" EP{ep}" if ep > 1 else ""), replica_of, emit, symmetry, held, recomputed)


def _held(architecture: Architecture, with_added: bool) -> dict[str, Held]:
    """What files, or rollout engines (which also hold ``with_added`` values), hold otherwise than most tensors."""
    if isinstance(architecture, ModuleArchitecture):
        return held_of(architecture.tensors)
    found = {}
    for prefix, parameter in describe(architecture).parameters():
        rollout = (parameter.rollout_add, parameter.rollout_dtype or parameter.dtype)
        held = Held(*rollout) if with_added else Held(0.0, parameter.dtype)
        if held != AS_IT_IS:
            found.update({prefix + name: held for name, _ in parameter.logical()})
    return found


class _RolloutKind:
    """Logical tensor -> its kind: layers with equal parameters are placed alike, and so are all experts of one
    expert-parallel rank."""

    def __init__(self, model: ModelDescription, ep: int) -> None:
        first: dict[Hashable, int] = {}
        self.layers = [first.setdefault(layer.parameters, index) for index, layer in enumerate(model.layers)]
        mixtures = [layer.mlp for layer in model.layers if isinstance(layer.mlp, ExpertMLP)]
        self.num_experts, self.ep = (mixtures[0].experts.num_experts if mixtures else 1), ep
        experts = "|".join(sorted({re.escape(mixture.names.experts) for mixture in mixtures}))
        expert = rf"(?:(?:{experts})(\d+)\.(.*))?" if mixtures else "()()"
        self.pattern = re.compile(rf"{re.escape(model.layers_prefix)}(\d+)\.{expert}")

    def __call__(self, tensor: str) -> Hashable:
        match = self.pattern.match(tensor)
        if match is None:
            return tensor
        layer, expert, name = match.groups()
        alike = self.layers[int(layer)]
        if not expert:
            return alike, tensor[match.end() :]
        return alike, int(expert) * self.ep // self.num_experts, name


def rollout_vocab(vocab: int, tp: int) -> int:
    """Rows of SGLang's embedding over all ranks: a multiple of 64, or of ``64 * tp`` where tp does not divide that
    (sglang VocabParallelEmbedding)."""
    padded = -(-vocab // 64) * 64
    return padded if padded % tp == 0 else -(-vocab // (64 * tp)) * 64 * tp


def check_megatron(architecture: Architecture, sizes: ParallelSizes, padded_vocab: int) -> None:
    """Raise ConfigError unless Megatron can hold ``architecture`` in these sizes."""
    a = architecture
    _check_heads(a, sizes.tp, "parallel.tp")
    _check_dense(a, sizes.tp, "parallel.tp")
    _check_divides(padded_vocab, sizes.tp, "padded vocabulary", "parallel.tp")
    if padded_vocab < a.vocab:
        raise ConfigError(f"padded vocabulary of {padded_vocab} rows cannot hold {a.vocab} tokens: raise it")
    stage_layers(a.num_layers, sizes.pp, sizes.vpp)
    if sizes.vpp > 1 and sizes.pp == 1:
        raise ConfigError(f"parallel.vpp={sizes.vpp} needs parallel.pp of at least 2: raise pp, or leave vpp out")
    if a.experts is None:
        if sizes.ep > 1:  # etp may be anything: Megatron-Core's default for it is tp
            raise ConfigError(f"parallel.ep={sizes.ep}, but {a.family} has no experts: leave it at 1")
        return
    _check_divides(a.experts.num_experts, sizes.ep, "number of experts", "parallel.ep")
    _check_divides(a.experts.ffn, sizes.etp, "expert intermediate size", "parallel.etp")
    if a.experts.biased and sizes.etp > 1:
        raise ConfigError(f"parallel.etp={sizes.etp}, but Megatron-Core cuts no experts with biases: set it to 1")
    _check_divides(a.experts.shared_ffn, sizes.tp, "shared expert intermediate size", "parallel.tp")


def check_rollout(architecture: Architecture, tp: int, ep: int = 1) -> None:
    """Raise ConfigError unless SGLang can hold ``architecture`` in these sizes."""
    a = architecture
    if isinstance(a, ModuleArchitecture):
        if tp > 1 or ep > 1:
            raise ConfigError(
                f"rollout.tp={tp}, but where no family says how weights are cut, an engine holds whole modules "
                f"({a.family}): set rollout.tp to 1"
            )
        return
    _check_heads(a, tp, "rollout.tp")
    _check_dense(a, tp, "rollout.tp")
    if ep > 1 and a.experts is None:
        raise ConfigError(f"rollout.ep={ep}, but {a.family} has no experts: leave it at 1")
    _check_divides(tp, ep, "rollout.tp", "rollout.ep")
    if a.experts is not None:
        _check_divides(a.experts.num_experts, ep, "number of experts", "rollout.ep")
        _check_divides(a.experts.ffn, tp // ep, "expert intermediate size", "rollout.tp / rollout.ep")
        _check_divides(a.experts.shared_ffn, tp, "shared expert intermediate size", "rollout.tp")


def _check_divides(size: int, count: int, what: str, key: str) -> None:
    if count < 1 or size % count:
        raise ConfigError(f"{what} {size} is not divisible by {key}={count}: set {key} to a divisor of {size}")


def _check_heads(a: Architecture, tp: int, key: str) -> None:
    _check_divides(a.num_heads, tp, "number of attention heads", key)
    if a.num_kv_heads % tp and tp % a.num_kv_heads:
        raise ConfigError(
            f"{a.num_kv_heads} key/value heads and {key}={tp}: one must divide the other, "
            f"set {key} to a divisor or a multiple of {a.num_kv_heads}"
        )


def _check_dense(a: Architecture, tp: int, key: str) -> None:
    if a.experts is None or a.experts.dense_layers:
        _check_divides(a.ffn, tp, "intermediate size", key)
