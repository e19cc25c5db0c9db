"""Episodes on a real SGLang server: exact tokens over turns, and pushes between them."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from environments.playing import play
from integration.servers import MODEL, members_of, processes_of, wait_for
from rollout.engine_contract import Loaded
from rollout.rollout_models import reference_logprobs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.batch import Prompt
from megatron_rl.environments import Environment, Step, Transcript
from megatron_rl.rollout import SamplingParams, SGLangEngine, WeightCheck
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


def episodes(environment: Any, **limits: Any) -> Episodes:
    return Episodes(environment, tokenizer(), rewritten_history="keep", **limits)


class Talk(Environment):
    """Goes on until a limit ends the episode; all episodes of a class count their steps together.

    Subclasses have ``lock``, ``heard``, ``closed`` and ``at`` of their own (`talk`).
    """

    lock: threading.Lock
    heard: list[tuple[int, str]]  # (prompt, message) of each step
    closed: Counter[int]  # by prompt
    at: dict[int, Any]  # number of a step: called in it

    def reset(self, prompt: Prompt) -> Any:
        self.index = prompt.index
        return prompt.text

    def step(self, message: Any) -> Any:
        with self.lock:
            self.heard.append((self.index, message["content"]))
            number = len(self.heard)
        self.at.get(number, lambda: None)()
        return Step("go on", 1.0)

    def close(self) -> None:
        with self.lock:
            self.closed[self.index] += 1


def talk(**steps: Any) -> type[Talk]:
    at = {int(name.removeprefix("step")): action for name, action in steps.items()}
    return type("OneTalk", (Talk,), {"lock": threading.Lock(), "heard": [], "closed": Counter(), "at": at})


def play_long(environment: type[Talk], loaded: Loaded, count: int) -> list[Transcript]:
    """Episodes of up to 200 tokens, some turns each, checked for being whole and counted once."""
    asked = [Prompt([1], text=f"question {i}", index=i) for i in range(count)]
    params = SamplingParams(max_tokens=200, stop_token_ids=(98, 99))
    found = play(episodes(environment, max_tokens=200, max_turns=100), asked, loaded.engine, params)
    assert [len(group) for group in found] == [1] * count
    assert environment.closed == Counter(range(count))
    transcripts = [group[0] for group in found]
    for prompt, transcript in zip(asked, transcripts, strict=True):
        assert transcript.messages[0]["content"] == prompt.text
        said = [message["content"] for message in transcript.messages if message["role"] == "assistant"]
        heard = [content for index, content in environment.heard if index == prompt.index]
        assert transcript.turns == len(said)
        assert heard in (said, said[:-1])  # a turn that a limit cuts off is not for the environment
        assert transcript.reward == len(heard)
        assert transcript.finish_reason == "length"
        assert 150 < len(transcript.token_ids) <= 200
        assert len(transcript.token_ids) == len(transcript.mask) == len(transcript.logprobs)
        assert sum(tokens for _, tokens in transcript.spans) == len(transcript.token_ids)
    return transcripts


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


def test_episodes_of_200_tokens_that_run_across_three_pushes_say_which_version_wrote_each_token(loaded: Loaded) -> None:
    flipped = {name: -shard if "lm_head" in name else shard for name, shard in loaded.shards.items()}
    opposite = copy.deepcopy(MODEL)
    with torch.no_grad():
        opposite.lm_head.weight.neg_()
    loaded.engine.load_shards(loaded.shards, 21)

    def push(shards: Any, version: int) -> Any:
        return lambda: loaded.engine.load_shards(shards, version)

    environment = talk(step6=push(flipped, 22), step16=push(loaded.shards, 23), step26=push(flipped, 24))
    transcripts = play_long(environment, loaded, 16)
    versions, within_turns, worst = Counter[int](), 0, 0.0
    for transcript in transcripts:
        numbers = [version for version, _ in transcript.spans]
        assert numbers == sorted(set(numbers))
        versions.update(numbers)
        error = {}
        for model, parity in ((MODEL, 1), (opposite, 0)):
            wanted = reference_logprobs(model, transcript.prompt_ids, transcript.token_ids)
            error[parity] = (torch.tensor(transcript.logprobs) - wanted).abs()
        start, mask = 0, torch.tensor(transcript.mask).bool()
        for version, count in transcript.spans:
            own = slice(start, start + count)
            worst = max(worst, float(error[version % 2][own][mask[own]].max()))
            within_turns += bool(start and mask[start - 1] and mask[start])
            start += count
    print(f"episodes by version: {dict(versions)}; {within_turns} pushes within turns; within {worst:.1e}")
    assert worst < 1e-3
    assert set(versions) == {21, 22, 23, 24}
    assert within_turns > 0
    loaded.engine.load_shards(loaded.shards, 7)


def test_a_server_killed_in_mid_episode_costs_no_episode_and_counts_none_twice(loaded: Loaded) -> None:
    engine = loaded.engine
    assert isinstance(engine, SGLangEngine)
    victim = members_of(engine)[0]
    started = victim.client
    engine.load_shards(loaded.shards, 31)

    busy: list[int] = []

    def kill() -> None:
        busy.append(victim.load)
        for process in processes_of(victim.server):
            os.kill(process, signal.SIGKILL)

    transcripts = play_long(talk(step12=kill), loaded, 24)
    assert victim.failures
    assert busy[0] > 0, "the server had no request when it was killed"
    for transcript in transcripts:
        assert transcript.spans == [(31, len(transcript.token_ids))]
        wanted = reference_logprobs(MODEL, transcript.prompt_ids, transcript.token_ids)
        error = (torch.tensor(transcript.logprobs) - wanted).abs()
        assert error[torch.tensor(transcript.mask).bool()].max() < 1e-3

    def is_back() -> bool:
        engine.generate([[5, 9]] * 16, SamplingParams(max_tokens=8))
        return victim.client is not started

    print(f"{busy[0]} requests on the server that was killed; serving again after {wait_for(is_back, 300.0):.1f} s")
    assert engine.verify_weights() == WeightCheck(2)
