"""Which experts a real server sent each token to, kept on the samples of a flow, against the trainer's own routers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.environment import sglang_python
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.environments import Environment, Step
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.reward_model import RewardModel

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
LAYERS, EXPERTS, TOP_K = 3, 8, 2
PROMPTS = [[5, 9, 11, 40, 3], list(range(100, 130)), [7], [5, 9, 11, 40, 4]]  # the last one shares a cached prefix


def write_model(folder: Path) -> str:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.08,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(512)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    words.decoder = decoders.Fuse()
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<0>"}
    special["chat_template"] = "{% for m in messages %}{{ m.content }}<2>{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actor]:
    """In fp32, as its server: then equal routers differ by ties only."""
    python, folder = sglang_python(), write_model(tmp_path_factory.mktemp("moe"))
    server = {"python": python, "context_length": 512, "max_total_tokens": 8192}
    options = {"server": server, "return_routed_experts": True}
    rollout = {"engine": "sglang", "max_running": 8, "options": options}
    actor = Actor(folder, PreTrainedTokenizerFast.from_pretrained(folder), config={"rollout": rollout})
    try:
        yield actor
    finally:
        actor.close()


def num_tokens(sample: Sample) -> int:
    return len(sample.prompt.token_ids) + len(sample.response_ids)


def routers_of(actor: Actor, sample: Sample) -> tuple[Tensor, Tensor]:
    """([layers, tokens, experts] bool, log-probabilities of the tokens): the trainer's own on the sample's tokens."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[1]))
        for chunk in actor.engine.chunks
        for module in chunk.modules()
        if type(module).__name__ == "TopKRouter"
    ]
    batch = Batch(samples=[sample])
    batch.sequences["rewards"] = torch.zeros(1)
    GRPO(actor, kl_coefficient=0.0).pack_stage().run(batch)
    actor.logprobs().run(batch)
    for hook in hooks:
        hook.remove()
    assert len(seen) == LAYERS
    return torch.stack([taken.view(-1, EXPERTS)[: num_tokens(sample)] for taken in seen]), batch["old_logprobs"]


def check_routing(actor: Actor, samples: list[Sample]) -> None:
    """Every token but the last has the experts that the trainer's own routers choose, ties excepted."""
    equal, total, worst = 0, 0, 0.0
    for sample in samples:
        routed = torch.from_numpy(sample.metadata["routed_experts"]).long()
        # The last token generated was not fed to the model.
        assert routed.shape == (num_tokens(sample) - 1, LAYERS, TOP_K)
        assert routed.min() >= 0
        assert routed.max() < EXPERTS
        assert (routed[..., 0] != routed[..., 1]).all()
        own, logprobs = routers_of(actor, sample)
        theirs = torch.zeros(num_tokens(sample) - 1, LAYERS, EXPERTS, dtype=torch.bool).scatter_(2, routed, True)
        same = (theirs == own[:, :-1].transpose(0, 1)).all(-1)
        equal, total = equal + int(same.sum()), total + same.numel()
        difference = logprobs[-len(sample.response_ids) :] - torch.tensor(sample.rollout_logprobs)
        worst = max(worst, float(difference[torch.tensor(sample.mask).bool()].abs().max()))
    print(f"{equal} of {total} routings are the trainer's; log-probabilities within {worst:.1e}")
    assert equal >= 0.998 * total
    assert worst < 1e-3


def test_samples_carry_the_servers_routing_and_it_is_the_trainers(actor: Actor) -> None:
    batch = Batch(prompts=[Prompt(tokens, index=i) for i, tokens in enumerate(PROMPTS)])
    flow = actor.sample(n=3, max_tokens=24, ignore_eos=True, temperature=1.0) >> RewardModel(lambda _: 1.0).score()
    flow(batch)
    assert len(batch.samples) == 12
    check_routing(actor, batch.samples)


class ThreeTurns(Environment):
    turns = 0

    def step(self, message: Any) -> Step:
        self.turns += 1
        return Step(f"<{200 + self.turns}><7>", 1.0, self.turns == 3)


def test_episodes_keep_the_routing_of_all_their_turns(actor: Actor) -> None:
    asked = [Prompt(tokens, text="".join(f"<{t}>" for t in tokens), index=i) for i, tokens in enumerate(PROMPTS)]
    batch = Batch(prompts=asked)
    stop = tuple(range(256, 512))  # half of the tokens: turns are short
    sample = actor.sample(n=3, max_tokens=40, stop_token_ids=stop, temperature=1.0, environment=ThreeTurns)
    (sample >> RewardModel(lambda _: 1.0).score())(batch)
    assert len(batch.samples) == 12
    assert sum(sample.metadata["turns"] == 3 for sample in batch.samples) >= 10
    check_routing(actor, batch.samples)
