"""Episodes of a small random model on the local engine, for the tests of environments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from environments.chat_templates import QWEN, tokenizer_of
from rollout.rollout_models import local_engine
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_rl.batch import Prompt
from megatron_rl.rollout import LocalEngine, RolloutEngine, SamplingParams
from megatron_rl.workers.episodes import Episodes
from megatron_rl.workers.response_text import ResponseDecoder

CONTEXT = 512


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of(QWEN)


@cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    eos = tokenizer().eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=eos, bos_token_id=0, pad_token_id=0,
        dtype="float32", attn_implementation="eager",
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight[eos] *= 0.0  # so that turns of a random model end now and then
    return made


def engine(**options: Any) -> LocalEngine:
    return local_engine(model(), eos_token_ids=[tokenizer().eos_token_id], **options)


def prompts(count: int) -> list[Prompt]:
    return [Prompt([1], text=f"question {i}", index=i) for i in range(count)]


def play(
    environment: Any, asked: Sequence[Prompt], on: RolloutEngine, params: SamplingParams, context: int = CONTEXT
) -> list[list[Any]]:
    """The outcomes of episodes, of each prompt ``params.n``.

    Raises:
        EpisodeError: one failed, and failures stop the run.
    """
    episodes = environment if isinstance(environment, Episodes) else Episodes(environment, tokenizer())
    own: Any = episodes.chat.tokenizer
    found = episodes.play(
        on,
        asked,
        params,
        seeds=[100 + prompt.index for prompt in asked],
        decode=ResponseDecoder(own, {own.eos_token_id, own.pad_token_id}),
        stop_token_ids={own.eos_token_id, *params.stop_token_ids},
        context=context,
    )
    for prompt, outcomes in zip(asked, found, strict=False):
        episodes.samples(prompt, outcomes, 0)  # raises where one failed, as in a run
    return found
