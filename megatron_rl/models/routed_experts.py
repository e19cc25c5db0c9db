"""`RoutedExperts`: the mixture-of-experts parameters of one layer, in every system's layout.

Logical tensors are one gate, up and down matrix per expert, as Hugging Face files store them. Megatron keeps one
matrix pair per local expert, SGLang and `transformers` stack the experts of a rank into two three-dimensional tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_rl.models.parameters import Axis, Parameter, Place, Shape
from megatron_rl.reshard.layout import Shard, Span, block, stack_rows


@dataclass(frozen=True, slots=True)
class RoutedExperts(Parameter):
    """``num_experts`` gated feed-forward networks; expert parallelism gives each rank a contiguous block of them."""

    num_experts: int
    ffn: int
    hidden: int

    def logical(self) -> Iterable[tuple[str, Shape]]:
        for expert in range(self.num_experts):
            yield f"mlp.experts.{expert}.gate_proj.weight", (self.ffn, self.hidden)
            yield f"mlp.experts.{expert}.up_proj.weight", (self.ffn, self.hidden)
            yield f"mlp.experts.{expert}.down_proj.weight", (self.hidden, self.ffn)

    def megatron(self, at: Place) -> Iterator[Shard]:
        start, stop = block(self.ffn, at.expert_tp.index, at.expert_tp.count, "the expert feed-forward size")
        for local, expert in enumerate(self._experts(at.ep)):
            fc1, fc2 = at.naming.expert_names(local)
            yield Shard(at.local + fc1, (2 * (stop - start), self.hidden), self._up(at.hf, expert, start, stop))
            yield Shard(at.local + fc2, (self.hidden, stop - start), (self._down(at.hf, expert, start, stop),))

    def rollout(self, at: Place) -> Iterator[Shard]:
        """FusedMoE: ``w13_weight`` [E_local, 2*I/moe_tp, H] = [gate ; up], ``w2_weight`` [E_local, H, I/moe_tp]."""
        return self._stacked(at, "mlp.experts.w13_weight", "mlp.experts.w2_weight")

    def transformers(self, at: Place) -> Iterator[Shard]:
        """transformers 5 Qwen3MoeExperts: ``gate_up_proj`` [E, 2*I, H], ``down_proj`` [E, H, I]."""
        return self._stacked(Place(hf=at.hf, local=at.hf), "mlp.experts.gate_up_proj", "mlp.experts.down_proj")

    def _stacked(self, at: Place, up_name: str, down_name: str) -> Iterator[Shard]:
        start, stop = block(self.ffn, at.expert_tp.index, at.expert_tp.count, "the expert feed-forward size")
        experts, width = self._experts(at.ep), stop - start
        up: list[Span] = []
        down: list[Span] = []
        for local, expert in enumerate(experts):
            up += self._up(at.hf, expert, start, stop, row=local * 2 * width)
            down.append(self._down(at.hf, expert, start, stop, row=local * self.hidden))
        yield Shard(at.local + up_name, (len(experts), 2 * width, self.hidden), tuple(up))
        yield Shard(at.local + down_name, (len(experts), self.hidden, width), tuple(down))

    def _experts(self, ep: Axis) -> range:
        return range(*block(self.num_experts, ep.index, ep.count, "the number of experts"))

    def _up(self, prefix: str, expert: int, start: int, stop: int, row: int = 0) -> tuple[Span, ...]:
        pieces = [(f"{prefix}mlp.experts.{expert}.{half}_proj.weight", start, stop) for half in ("gate", "up")]
        return stack_rows(pieces, self.hidden, row)

    def _down(self, prefix: str, expert: int, start: int, stop: int, row: int = 0) -> Span:
        return Span(f"{prefix}mlp.experts.{expert}.down_proj.weight", 0, self.hidden, start, stop, row, 0)
