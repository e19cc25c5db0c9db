"""`Embedding` and `OutputLayer`: the two ends of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.models.parameters import Parameter, Replicated, VocabularyRows

SCORE = "score.weight"  # of Hugging Face's sequence classifiers, whatever the family


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids to hidden states."""

    vocab: int  # rows of the Hugging Face tensor, without any padding
    hidden: int
    hf: str = "model.embed_tokens.weight"
    scale: float = 1.0  # of the hidden states, rounded to their dtype first
    whole_in_rollout: bool = False  # every rank of a rollout engine has all rows, without padding

    def parameter(self) -> Parameter:
        megatron = "embedding.word_embeddings.weight"
        return VocabularyRows(self.hf, self.vocab, self.hidden, megatron, self.hf, self.whole_in_rollout)


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """Hidden states to logits. Tied, its weight is one more copy of the embedding (Megatron's last pipeline stage)."""

    vocab: int
    hidden: int
    hf: str = "lm_head.weight"
    rollout_name: str = "lm_head.weight"
    softcap: float | None = None  # logits become softcap * tanh(logit / softcap)

    def parameter(self) -> Parameter:
        return VocabularyRows(self.hf, self.vocab, self.hidden, "output_layer.weight", self.rollout_name)


@dataclass(frozen=True, slots=True)
class ValueOutput:
    """Hidden states to one number a position, in the place of an `OutputLayer`."""

    hidden: int
    hf: str = SCORE

    def parameter(self) -> Parameter:
        return Replicated(self.hf, (1, self.hidden), "output_layer.weight")
