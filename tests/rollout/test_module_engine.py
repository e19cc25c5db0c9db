"""The engine that generates with a module of `transformers`: the contract of all engines, and the local engine's
answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines.fsdp2.tiny_models import VOCAB, tiny_model
from rollout.engine_contract import EngineContract, Loaded
from rollout.rollout_models import architecture_of, local_engine, random_model
from transformers import PreTrainedModel

from megatron_rl.models import Architecture
from megatron_rl.models.hf_config import best_architecture
from megatron_rl.rollout import ENGINES, LocalEngine, ModuleEngine, SamplingParams


def module_engine(model: PreTrainedModel, architecture: Architecture, **options: object) -> ModuleEngine:
    layout = ModuleEngine.lay_out(architecture, 1, [[0]])
    engine = ModuleEngine(architecture, layout, eos_token_ids=[2], **options)
    engine.load_shards(shards_of(model, engine), 7)
    return engine


def shards_of(model: PreTrainedModel, engine: ModuleEngine) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: state[name].clone() for name in engine.targets()}


@pytest.fixture(scope="module", params=["olmo2", "qwen3_next", "gpt2"])
def loaded(request) -> Iterator[Loaded]:
    model = tiny_model(request.param)
    with module_engine(model, best_architecture(model.config)) as engine:
        yield Loaded(engine, model, shards_of(model, engine), vocab=VOCAB, eos=2)


class TestModuleEngineKeepsTheContract(EngineContract):
    """See `EngineContract`."""


def test_it_draws_what_the_local_engine_draws():
    model = random_model("llama")
    architecture, prompts = architecture_of(model.config), [[5, 9, 11], [7], [20, 21, 22], [4, 4, 4, 4]]
    params = SamplingParams(n=3, max_tokens=12, top_p=0.9, stop_token_ids=tuple(range(10, 100, 7)))
    with module_engine(model, architecture, max_running=4) as ours, local_engine(model, eos_token_ids=[2]) as local:
        answers = [
            [[completion.token_ids for completion in group] for group in engine.generate(prompts, params)]
            for engine in (ours, local)
        ]
    assert answers[0] == answers[1]


def test_local_stands_for_it_where_there_is_no_family():
    assert LocalEngine.for_model(best_architecture(tiny_model("olmo2").config)) is ENGINES["transformers"]
    assert LocalEngine.for_model(architecture_of(random_model("llama").config)) is LocalEngine
