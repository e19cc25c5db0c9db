"""Episodes on a real SGLang server: exact tokens over turns, and pushes between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from environments.playing import play
from integration.servers import MODEL
from rollout.engine_contract import Loaded
from rollout.rollout_models import reference_logprobs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.batch import Prompt
from megatron_rl.environments import Environment, Step
from megatron_rl.rollout import SamplingParams
from megatron_rl.workers.episodes import Episodes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
TURN = SamplingParams(max_tokens=50, n=2, stop_token_ids=tuple(range(90, 100)))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """The hundred tokens of the tests' model: printable characters, and what the template writes."""
    tokens = ["<pad>", "<user>", "<end>", "<assistant>", "<unk>", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<(?:pad|user|end|assistant|unk)>|."), "isolated")
    inner.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def episodes(environment: Any) -> Episodes:
    return Episodes(environment, tokenizer(), rewritten_history="keep")


def test_two_turns_on_a_real_server_are_one_sample_with_exact_log_probabilities(loaded: Loaded) -> None:
    class TwoTurns(Environment):
        turns = 0

        def step(self, message: Any) -> Any:
            self.turns += 1
            return Step(f"turn {self.turns}", 1.0, self.turns == 2)

    loaded.engine.load_shards(loaded.shards, 7)
    asked = [Prompt([1], text=f"question {i}", index=i) for i in range(8)]
    found = [t for group in play(episodes(TwoTurns), asked, loaded.engine, TURN) for t in group]
    assert len(found) == 16
    assert any(t.turns == 2 and t.finish_reason == "stop" for t in found)
    for transcript in found:
        expected = reference_logprobs(MODEL, transcript.prompt_ids, transcript.token_ids)
        mask = torch.tensor(transcript.mask, dtype=torch.bool)
        assert (torch.tensor(transcript.logprobs) - expected).abs()[mask].max() < 1e-3
        observed = [token for token, bit in zip(transcript.token_ids, transcript.mask, strict=True) if not bit]
        wanted = "<user>turn 1<end><assistant>" if transcript.turns == 2 else ""
        assert tokenizer().decode(observed) == wanted
        assert transcript.spans == [(7, len(transcript.token_ids))]


def test_an_episode_across_three_pushes_says_which_version_wrote_each_turn(loaded: Loaded) -> None:
    flipped = {name: -shard if "lm_head" in name else shard for name, shard in loaded.shards.items()}

    class Pushing(Environment):
        version = 7

        def step(self, message: Any) -> Any:
            self.version += 1
            if self.version < 11:
                loaded.engine.load_shards(flipped if self.version % 2 == 0 else loaded.shards, self.version)
            return Step("go on", 0.0, self.version == 11)

    loaded.engine.load_shards(loaded.shards, 7)
    turn = SamplingParams(max_tokens=100, stop_token_ids=tuple(range(60, 100)))
    ((transcript,),) = play(episodes(Pushing), [Prompt([1], text="tell me", index=0)], loaded.engine, turn)
    assert transcript.turns == 4
    assert [version for version, _ in transcript.spans] == [7, 8, 9, 10]
    assert transcript.policy_version == 10
    assert sum(count for _, count in transcript.spans) == len(transcript.token_ids)
    expected = reference_logprobs(MODEL, transcript.prompt_ids, transcript.token_ids)
    error, mask = (torch.tensor(transcript.logprobs) - expected).abs(), torch.tensor(transcript.mask).bool()
    start = 0
    for version, count in transcript.spans:  # odd versions are the reference's weights, even ones have opposite logits
        own = error[start : start + count][mask[start : start + count]]
        assert own.max() < 1e-3 if version % 2 else own.max() > 0.1
        start += count
    loaded.engine.load_shards(loaded.shards, 7)
