"""What every rollout engine must do, as a base class: an engine's test module subclasses it and provides the
``engine`` fixture (a `Loaded`), so that one set of specifications holds for all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from rollout.rollout_models import reference_logprobs
from transformers import PreTrainedModel

from megatron_rl.rollout import RolloutEngine, SamplingParams


@dataclass
class Loaded:
    """An engine that serves ``shards`` as version 7, and the same model in transformers."""

    engine: RolloutEngine
    model: PreTrainedModel
    shards: dict[str, torch.Tensor]  # of this rank
    vocab: int
    eos: int
    logprob_tolerance: float = 1e-4
    exact_seeds: bool = True  # completions are a function of the seeds alone


class EngineContract:
    """Specifications; ``prompts`` are three short ones of different lengths."""

    prompts = ([5, 9, 11, 40, 3], [7], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31])

    def test_returns_n_completions_of_each_prompt_in_order(self, loaded: Loaded) -> None:
        answers = loaded.engine.generate(self.prompts, SamplingParams(n=3, max_tokens=6))
        assert [len(group) for group in answers] == [3, 3, 3]
        for completion in (completion for group in answers for completion in group):
            assert 1 <= len(completion.token_ids) <= 6
            assert len(completion.logprobs) == len(completion.token_ids)
            assert completion.finish_reason in ("stop", "length")
            assert completion.policy_version == 7
            assert completion.policy_version_spans == [(7, len(completion.token_ids))]

    def test_logprobs_are_those_of_a_full_forward(self, loaded: Loaded) -> None:
        params = SamplingParams(n=2, max_tokens=12, temperature=0.8, ignore_eos=True)
        for prompt, group in zip(self.prompts, loaded.engine.generate(self.prompts, params), strict=True):
            for completion in group:
                expected = reference_logprobs(loaded.model, prompt, completion.token_ids, 0.8)
                error = (torch.tensor(completion.logprobs) - expected).abs().max()
                assert error <= loaded.logprob_tolerance

    def test_greedy_takes_the_likeliest_token(self, loaded: Loaded) -> None:
        params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
        for prompt, (completion,) in zip(self.prompts, loaded.engine.generate(self.prompts, params), strict=True):
            with torch.no_grad():
                logits = loaded.model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            taken = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert (logits.max(-1).values - taken).max() <= loaded.logprob_tolerance

    def test_samples_of_one_prompt_differ(self, loaded: Loaded) -> None:
        (group,) = loaded.engine.generate([self.prompts[0]], SamplingParams(n=8, max_tokens=12, ignore_eos=True))
        assert len({tuple(completion.token_ids) for completion in group}) > 4

    def test_same_seeds_same_completions_and_other_seeds_others(self, loaded: Loaded) -> None:
        if not loaded.exact_seeds:
            pytest.skip("this engine draws from its own random state")
        params = SamplingParams(n=2, max_tokens=16, ignore_eos=True)
        first, again, other = (
            [[c.token_ids for c in group] for group in loaded.engine.generate(self.prompts, params, seeds)]
            for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6])
        )
        assert first == again
        assert all(a != b for a, b in zip(first, other, strict=True))

    def test_a_stop_token_ends_and_is_kept(self, loaded: Loaded) -> None:
        plain = loaded.engine.generate(
            [self.prompts[0]], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        )[0][0]
        stop = plain.token_ids[9]
        first = plain.token_ids.index(stop)
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop_token_ids=(stop,))
        stopped = loaded.engine.generate([self.prompts[0]], params)[0][0]
        assert stopped.token_ids == plain.token_ids[: first + 1]
        assert stopped.finish_reason == "stop"
        assert plain.finish_reason == "length"

    def test_eos_ends_unless_ignored(self, loaded: Loaded) -> None:
        prompts = [[token] for token in range(5, 45)]
        ended = loaded.engine.generate(prompts, SamplingParams(n=2, max_tokens=32))
        reasons = Counter(completion.finish_reason for group in ended for completion in group)
        assert reasons["stop"], "the model should emit its end-of-sequence token now and then"
        for completion in (completion for group in ended for completion in group):
            assert loaded.eos not in completion.token_ids[:-1]
            assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == loaded.eos)
        for (completion,) in loaded.engine.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True)):
            assert len(completion.token_ids) == 32

    def test_an_update_changes_what_is_served_and_its_version(self, loaded: Loaded) -> None:
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        before = loaded.engine.generate(self.prompts, params)
        changed = {name: shard * 1.5 if "mlp" in name else shard for name, shard in loaded.shards.items()}
        loaded.engine.load_shards(changed, 8)
        after = loaded.engine.generate(self.prompts, params)
        assert loaded.engine.policy_version == after[0][0].policy_version == 8
        assert [g[0].token_ids for g in before] != [g[0].token_ids for g in after]
        loaded.engine.load_shards(loaded.shards, 7)
        restored = loaded.engine.generate(self.prompts, params)
        assert [g[0].token_ids for g in before] == [g[0].token_ids for g in restored]

    def test_a_half_written_engine_refuses_to_generate(self, loaded: Loaded) -> None:
        loaded.engine.begin_update()
        with pytest.raises(RuntimeError, match="middle of a weight update"):
            loaded.engine.generate(self.prompts, SamplingParams(max_tokens=2))
        loaded.engine.load_shards(loaded.shards, 7)
        assert loaded.engine.generate(self.prompts, SamplingParams(max_tokens=2))

    def test_an_empty_prompt_is_refused_by_number(self, loaded: Loaded) -> None:
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            loaded.engine.generate([[5], []], SamplingParams(max_tokens=2))

    def test_a_token_outside_the_vocabulary_is_refused(self, loaded: Loaded) -> None:
        with pytest.raises(ValueError, match=f"prompt 0 has token {loaded.vocab}"):
            loaded.engine.generate([[5, loaded.vocab]], SamplingParams(max_tokens=2))

    def test_no_prompts_no_completions(self, loaded: Loaded) -> None:
        assert loaded.engine.generate([], SamplingParams()) == []
