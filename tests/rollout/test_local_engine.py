"""The local engine: the contract of all engines, and what only it promises."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from rollout.engine_contract import EngineContract, Loaded
from rollout.rollout_models import Cutter, architecture_of, layout_of, local_engine, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.models import rollout_layout
from megatron_rl.rollout import ENGINES, Completion, LocalEngine, SamplingParams

Answers = list[list[Completion]]


def tokens(answers: Answers) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in answers]


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    model = random_model("llama")
    shards = Cutter(architecture_of(model.config), model.state_dict()).cut()
    with local_engine(model, version=7, eos_token_ids=[2]) as engine:
        yield Loaded(engine, model, shards, vocab=100, eos=2)


class TestLocalEngineKeepsTheContract(EngineContract):
    """See `EngineContract`."""


PROMPTS = [[5 + i, 9, 11, 40, 3][: 1 + i % 5] * (1 + i % 3) for i in range(12)]


def test_completions_do_not_depend_on_batch_order_or_composition(loaded: Loaded) -> None:
    params = SamplingParams(n=3, max_tokens=24, top_p=0.95)
    seeds = [100 + i for i in range(len(PROMPTS))]
    together = tokens(loaded.engine.generate(PROMPTS, params, seeds))
    alone = [tokens(loaded.engine.generate([p], params, [s]))[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    backwards = tokens(loaded.engine.generate(PROMPTS[::-1], params, seeds[::-1]))[::-1]
    assert together == alone
    assert together == backwards


@pytest.mark.parametrize("limits", [{"max_running": 5}, {"max_running": 2}, {"prefill_tokens": 3}])
def test_continuous_batching_changes_no_completion(loaded: Loaded, limits: dict[str, int]) -> None:
    params = SamplingParams(n=3, max_tokens=24, stop_token_ids=tuple(range(10, 100, 11)))
    with local_engine(loaded.model, eos_token_ids=[2], **limits) as small:
        crowded = small.generate(PROMPTS, params)
    free = loaded.engine.generate(PROMPTS, params)
    lengths = {len(completion.token_ids) for group in free for completion in group}
    assert len(lengths) > 6, "sequences should end at different times for rows to be reused"
    assert tokens(crowded) == tokens(free)


def test_the_kv_cache_stays_under_its_bound() -> None:
    model = random_model("llama")
    per_token = 3 * 2 * 2 * 8 * 4  # layers, kv heads, key and value, head_dim, bytes
    bound = 3 * per_token * 30 + 100
    with local_engine(model, kv_cache_bytes=bound) as engine:
        answers = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=15, ignore_eos=True))
        stored = sum(layer.numel() * layer.element_size() for layer in engine._decoder.cache.layers)
        assert 0 < stored <= bound
        assert all(len(completion.token_ids) == 15 for group in answers for completion in group)
        with pytest.raises(ValueError, match="kv_cache_bytes"):
            engine.generate([[5] * 20], SamplingParams(max_tokens=100))


def test_the_first_sample_is_the_same_whatever_n_is(loaded: Loaded) -> None:
    one = tokens(loaded.engine.generate(PROMPTS, SamplingParams(n=1, max_tokens=12)))
    four = tokens(loaded.engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=12)))
    assert [group[:1] for group in four] == one


def test_progress_counts_every_completion(loaded: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    params = SamplingParams(n=2, max_tokens=8)
    loaded.engine.generate(PROMPTS, params, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 24) for done in range(1, 25)]


def test_generating_before_any_weights_is_a_clear_error(loaded: Loaded) -> None:
    engine = LocalEngine(architecture_of(loaded.model.config), layout_of(loaded.shards))
    with pytest.raises(RuntimeError, match="holds no weights"):
        engine.generate([[5]], SamplingParams())
    with pytest.raises(RuntimeError, match="holds no weights"):
        _ = engine.policy_version
    with pytest.raises(RuntimeError, match="without begin_update"):
        engine.commit_update(1)


def test_weights_written_in_place_between_begin_and_commit_are_served(loaded: Loaded) -> None:
    engine = LocalEngine(architecture_of(loaded.model.config), layout_of(loaded.shards))
    engine.begin_update()
    for name, target in engine.targets().items():
        target.copy_(loaded.shards[name])
    engine.commit_update(3)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert tokens(engine.generate(PROMPTS, params)) == tokens(loaded.engine.generate(PROMPTS, params))


def test_a_wrong_update_is_refused_and_the_old_weights_serve_on(loaded: Loaded) -> None:
    short = {name: shard for name, shard in loaded.shards.items() if name != "model.norm.weight"}
    misshapen = loaded.shards | {"model.norm.weight": torch.zeros(3)}
    for shards, message in ((short, r"missing: \['model.norm.weight'\]"), (misshapen, "shape")):
        with pytest.raises(ValueError, match=message):
            loaded.engine.load_shards(shards, 9)
    assert loaded.engine.generate([[5]], SamplingParams(max_tokens=2))[0][0].policy_version == 7


def test_a_sleeping_engine_gives_its_memory_back_and_needs_new_weights(loaded: Loaded) -> None:
    engine = local_engine(loaded.model)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    before = tokens(engine.generate(PROMPTS, params))
    held = dict(engine.targets())
    engine.sleep()
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) == 0
    with pytest.raises(RuntimeError, match="sleep"):
        engine.begin_update()
    engine.wake()
    with pytest.raises(RuntimeError, match="holds no weights"):
        engine.generate(PROMPTS, params)
    engine.begin_update()
    for name, tensor in held.items():
        tensor.copy_(loaded.shards[name])
    engine.commit_update(2)
    assert tokens(engine.generate(PROMPTS, params)) == before


def test_sleep_of_the_cache_alone_keeps_the_weights(loaded: Loaded) -> None:
    engine = local_engine(loaded.model)
    engine.sleep(["kv_cache"])
    with pytest.raises(RuntimeError, match=r"call wake\(\)"):
        engine.generate([[5]], SamplingParams())
    engine.wake(["kv_cache"])
    assert engine.generate([[5]], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="unknown sleep tags"):
        engine.sleep(["cuda_graph"])


def test_weights_that_give_nan_are_named_and_do_not_poison_later_calls(loaded: Loaded) -> None:
    engine = local_engine(loaded.model)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    before = tokens(engine.generate(PROMPTS, params))
    broken = {name: shard * float("nan") if "o_proj" in name else shard for name, shard in loaded.shards.items()}
    engine.load_shards(broken, 2)
    with pytest.raises(RuntimeError, match="version 2 give NaN"):
        engine.generate(PROMPTS, params)
    engine.load_shards(loaded.shards, 3)
    assert tokens(engine.generate(PROMPTS, params)) == before


def test_a_prompt_beyond_the_context_is_refused_by_number(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has 120 tokens, .* context of 128"):
        loaded.engine.generate([[5], [5] * 120], SamplingParams(max_tokens=9))
    assert loaded.engine.generate([[5] * 120], SamplingParams(max_tokens=8))
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        loaded.engine.generate([[5]], SamplingParams(), [1, 2])


def test_layout_of_the_family_fits_the_hand_cut_shards(loaded: Loaded) -> None:
    architecture = architecture_of(loaded.model.config)
    for tp in (1, 2, 4):
        layout = rollout_layout(architecture, tp, [list(range(tp))])
        for rank in range(tp):
            shards = Cutter(architecture, loaded.model.state_dict(), tp, rank).cut()
            assert {s.name: s.shape for s in layout.shards(rank)} == {n: tuple(t.shape) for n, t in shards.items()}
    with pytest.raises(ValueError, match="rank 5 takes no part"):
        LocalEngine(architecture, layout, rank=5)


def test_engines_are_found_by_name() -> None:
    assert ENGINES["local"] is LocalEngine


def test_stop_text_ends_a_completion_at_the_token_that_completes_it(seeded_model: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(seeded_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(seeded_model)
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "Tim had a red ball", "The sun")]
    with local_engine(model, eos_token_ids=[1], tokenizer=tokenizer) as engine:
        plain = engine.generate(prompts, SamplingParams(n=2, max_tokens=60))
        stopped = engine.generate(prompts, SamplingParams(n=2, max_tokens=60, stop=("s ", "ed")))
        with pytest.raises(ValueError, match="need a tokenizer"):
            local_engine(model).generate(prompts, SamplingParams(stop=("x",)))
    found = 0
    for whole, short in zip(chain.from_iterable(plain), chain.from_iterable(stopped), strict=True):
        lengths = range(1, len(whole.token_ids) + 1)
        texts = {length: tokenizer.decode(whole.token_ids[:length]) for length in lengths}
        expected = next((n for n in lengths if "s " in texts[n] or "ed" in texts[n]), len(whole.token_ids))
        assert short.token_ids == whole.token_ids[:expected]
        if expected < len(whole.token_ids):
            assert short.finish_reason == "stop"
            assert short.metadata["stop"] in texts[expected]
            found += 1
    assert found >= 3
