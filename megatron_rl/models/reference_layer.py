"""One decoder layer as `transformers` computes it, to compare a Megatron job's layer with.

A model of one layer is made from the config that an export would have, and filled with that layer's logical tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.models.layouts import EVERYWHERE, transformers_layout
from megatron_rl.reshard.layout import Layout, Shard

LAYER = "model.layers.0."
SMALLEST_VOCAB = 8  # the one-layer model's own embedding, which nothing reads


class ReferenceLayer:
    """Layer ``index`` of ``architecture``, in fp32.

    ``layout`` says which logical tensors it wants, under which names; `run` takes them.
    """

    def __init__(self, architecture: Architecture, index: int) -> None:
        experts = architecture.experts
        if experts is not None:
            experts = replace(experts, dense_layers=(0,) if index in experts.dense_layers else ())
        self.index = index
        window = None if index in architecture.full_layers else architecture.window
        self.alone = replace(
            architecture,
            num_layers=1,
            vocab=SMALLEST_VOCAB,
            tied=True,
            value_model=False,
            experts=experts,
            window=window,
            full_layers=(),
        )

    def layout(self, rank: int) -> Layout:
        """``rank`` holds the layer's tensors as `transformers` names them in a model of this layer alone."""

        def emit(replica: Hashable) -> Iterator[Shard]:
            prefix = f"model.layers.{self.index}."
            for shard in transformers_layout(self.alone).shards_of(EVERYWHERE):
                if shard.name.startswith(LAYER):
                    spans = [replace(span, tensor=span.tensor.replace(LAYER, prefix, 1)) for span in shard.spans]
                    yield replace(shard, spans=tuple(spans))

        return Layout(f"layer {self.index}", {rank: EVERYWHERE}, emit)

    @torch.no_grad()
    def run(self, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The layer's output, divided by its root mean square over each position: ``[tokens, hidden]`` fp32.

        Args:
            tensors: of ``layout``, fp32.
            hidden: the layer's input for one sequence, ``[tokens, hidden]`` fp32.
        """
        from transformers import AutoModelForCausalLM  # costs two CPU-seconds, and few ranks ever come here

        with torch.random.fork_rng(devices=[]):  # making a model draws initial values
            model = AutoModelForCausalLM.from_config(hf_config_from(self.alone, dtype="float32")).eval()
        model.to(hidden.device)
        model.load_state_dict(dict(tensors), strict=False)
        model.model.norm.weight.fill_(1.0)
        return model.model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).last_hidden_state[0]
