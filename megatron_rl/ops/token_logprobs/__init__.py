"""Log-probabilities and entropies of tokens straight from hidden states, without a batch's full-vocabulary logits."""

from megatron_rl.ops.token_logprobs.interface import token_logprobs

__all__ = ["token_logprobs"]
