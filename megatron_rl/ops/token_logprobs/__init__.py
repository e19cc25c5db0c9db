"""Log-probabilities and entropies of tokens straight from hidden states, without a batch's full-vocabulary logits; and
from logits where these exist already."""

from megatron_rl.ops.token_logprobs.interface import from_logits, token_logprobs

__all__ = ["from_logits", "token_logprobs"]
