"""`RoutedExperts`: the mixture-of-experts parameters of one layer, in every system's layout.

Logical tensors are one gate, up and down matrix per expert, as Hugging Face files store them. Megatron keeps one
matrix pair per local expert, SGLang and `transformers` stack the experts of a rank into two three-dimensional tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_rl.models.parameters import Parameter, Place, Shape
from megatron_rl.reshard.layout import Shard, Span, block, stack_rows


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a layer's experts and their router are called; names lack the layer's prefix."""

    experts: str = "mlp.experts."  # in files and in SGLang, before the number of an expert, or the stacked tensors
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "mlp.gate.weight"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    shared: str = "mlp.shared_experts."  # before the matrices of the shared expert
    shared_gate: str = "mlp.shared_expert_gate.weight"
    module: str = ""  # in place of ``experts`` in the memory of `transformers`, where it differs
    module_router: str = ""  # the same of ``router``


EXPERT_NAMES = ExpertNames()  # as most mixtures of experts have them


@dataclass(frozen=True, slots=True)
class RoutedExperts(Parameter):
    """``num_experts`` gated feed-forward networks; expert parallelism gives each rank a contiguous block of them."""

    num_experts: int
    ffn: int
    hidden: int
    names: ExpertNames = EXPERT_NAMES

    def logical(self) -> Iterable[tuple[str, Shape]]:
        for expert in range(self.num_experts):
            yield self._name("", expert, self.names.gate), (self.ffn, self.hidden)
            yield self._name("", expert, self.names.up), (self.ffn, self.hidden)
            yield self._name("", expert, self.names.down), (self.hidden, self.ffn)

    def _name(self, prefix: str, expert: int, matrix: str) -> str:
        return f"{prefix}{self.names.experts}{expert}.{matrix}.weight"

    def megatron(self, at: Place) -> Iterator[Shard]:
        start, stop = block(self.ffn, at.expert_tp.index, at.expert_tp.count, "the expert feed-forward size")
        for local, expert in enumerate(local_experts(self.num_experts, at)):
            fc1, fc2 = at.naming.expert_names(local)
            yield Shard(at.local + fc1, (2 * (stop - start), self.hidden), self._up(at.hf, expert, start, stop))
            yield Shard(at.local + fc2, (self.hidden, stop - start), (self._down(at.hf, expert, start, stop),))

    def rollout(self, at: Place) -> Iterator[Shard]:
        """FusedMoE: ``w13_weight`` [E_local, 2*I/moe_tp, H] = [gate ; up], ``w2_weight`` [E_local, H, I/moe_tp]."""
        return self._stacked(at, f"{self.names.experts}w13_weight", f"{self.names.experts}w2_weight")

    def transformers(self, at: Place) -> Iterator[Shard]:
        """transformers 5 (Qwen3MoeExperts, MixtralExperts): ``gate_up_proj`` [E, 2*I, H], ``down_proj`` [E, H, I]."""
        module = self.names.module or self.names.experts
        return self._stacked(Place(hf=at.hf, local=at.hf), f"{module}gate_up_proj", f"{module}down_proj")

    def _stacked(self, at: Place, up_name: str, down_name: str) -> Iterator[Shard]:
        start, stop = block(self.ffn, at.expert_tp.index, at.expert_tp.count, "the expert feed-forward size")
        experts, width = local_experts(self.num_experts, at), stop - start
        up: list[Span] = []
        down: list[Span] = []
        for local, expert in enumerate(experts):
            up += self._up(at.hf, expert, start, stop, row=local * 2 * width)
            down.append(self._down(at.hf, expert, start, stop, row=local * self.hidden))
        yield Shard(at.local + up_name, (len(experts), 2 * width, self.hidden), tuple(up))
        yield Shard(at.local + down_name, (len(experts), self.hidden, width), tuple(down))

    def _up(self, prefix: str, expert: int, start: int, stop: int, row: int = 0) -> tuple[Span, ...]:
        pieces = [(self._name(prefix, expert, half), start, stop) for half in (self.names.gate, self.names.up)]
        return stack_rows(pieces, self.hidden, row)

    def _down(self, prefix: str, expert: int, start: int, stop: int, row: int = 0) -> Span:
        return Span(self._name(prefix, expert, self.names.down), 0, self.hidden, start, stop, row, 0)


def local_experts(num_experts: int, at: Place) -> range:
    """The experts of a rank."""
    return range(*block(num_experts, at.ep.index, at.ep.count, "the number of experts"))
