"""Questions about a model chunk, whoever built it and however it is wrapped: its layers, parameters, output weight."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor, nn

from megatron_rl.engines.megatron.model.decoder_layers import decoder_layers, gpt_name, named_parameters
from megatron_rl.models.naming import MegatronNaming, chunk_prefix

TRANSFORMER_ENGINE_ATTENTION = "TEDotProductAttention"
LOGICAL_BUFFERS = ("router.expert_bias",)  # buffers that are tensors of Hugging Face files, too


def unwrap(chunk: nn.Module) -> LanguageModule:
    """The Megatron language model inside ``DistributedDataParallel``, ``Float16Module`` and the like.

    Raises:
        ValueError: there is none.
    """
    inner = chunk
    while not isinstance(inner, LanguageModule):
        wrapped = inner._modules.get("module")
        if wrapped is None:
            raise ValueError(
                "expected a Megatron-Core language model (GPTModel or HybridModel), possibly wrapped, got "
                f"{type(chunk).__name__}"
            )
        inner = wrapped
    return inner


def layer_indices(chunk: nn.Module) -> tuple[int, ...]:
    """Global 0-based indices of the chunk's layers, in local order."""
    return tuple(layer.index for layer in decoder_layers(unwrap(chunk)))


def output_weight(chunk: nn.Module) -> Tensor:
    """The parameter ``[padded_vocab / tp, hidden]`` behind the logits of the last chunk, tied or not.

    Raises:
        ValueError: the chunk is not the last one of its pipeline.
    """
    model = unwrap(chunk)
    if not model.post_process:
        raise ValueError("only the last pipeline stage has an output weight")
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def supports_packing(chunk: nn.Module) -> bool:
    """Whether all core attentions of the chunk take packed sequences (`packed_seq_params`)."""
    attentions = [layer.attention.self_attention.core_attention for layer in decoder_layers(unwrap(chunk))]
    return all(
        getattr(attention, "supports_packing", type(attention).__name__ == TRANSFORMER_ENGINE_ATTENTION)
        for attention in attentions
    )


def chunk_tensors(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of a rank's chunks, wrapped or not, and `LOGICAL_BUFFERS`, named as in `megatron_layout`: detached
    views, no copies."""
    tensors = {}
    for index, chunk in enumerate(chunks):
        prefix, model = chunk_prefix(index, len(chunks)), unwrap(chunk)
        for name, parameter in named_parameters(model):
            tensors[prefix + name] = parameter.detach()
        for name, buffer in model.named_buffers():
            if name.endswith(LOGICAL_BUFFERS):
                tensors[prefix + gpt_name(model, name)] = buffer
    return tensors


def naming_of(chunks: Sequence[nn.Module]) -> MegatronNaming:
    """Which of Megatron's spellings the chunks use."""
    return MegatronNaming.detect(chunk_tensors(chunks))
