"""The roles take the same arguments in the same order, and their config in one way."""

from __future__ import annotations

import inspect

import pytest

from megatron_rl import Actor, Critic, Reference, RewardModel
from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.run.run_config import CriticConfig
from megatron_rl.workers.actor_config import ActorConfig

ROLES = {"actor": Actor, "critic": Critic, "reference": Reference, "reward model": RewardModel}
ORDER = ["model", "tokenizer", "optimizer", "parallel_state", "parallel", "context", "scheduler", "config"]
OWN = {
    "actor": {"rollout_engine"},
    "critic": set(),
    "reference": {"offload"},
    "reward model": {"kind", "options"},
}
OF_TRAINING = {"optimizer", "scheduler"}


@pytest.mark.parametrize("name", ROLES)
def test_shared_arguments_stand_in_one_order(name):
    found = list(inspect.signature(ROLES[name]).parameters)
    found[0] = "model"  # a reward model calls it source: it may be a function
    shared = [argument for argument in found if argument in ORDER]
    trained = name in ("actor", "critic")
    assert shared == [argument for argument in ORDER if trained or argument not in OF_TRAINING]
    assert set(found) - set(ORDER) == OWN[name]


@pytest.mark.parametrize("name", ["actor", "critic", "reference"])
def test_there_is_no_second_way_to_give_a_config(name):
    kinds = [parameter.kind for parameter in inspect.signature(ROLES[name]).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_config_is_a_record_or_its_fields():
    record = ActorConfig(token_budget=64, lora={"rank": 2})
    assert ActorConfig.of(record, "Actor") is record
    assert ActorConfig.of({"token_budget": 64, "lora": {"rank": 2}}, "Actor") == record
    assert ActorConfig.of(None, "Actor") == ActorConfig()
    assert EngineConfig.of(record, "Critic") is record  # an actor's config holds for a critic beside it
    widened = ActorConfig.of(EngineConfig(token_budget=64, lora={"rank": 2}), "Actor")
    assert widened == record
    with pytest.raises(ConfigError, match=r"^Critic: .*token_budgets.*token_budget"):
        EngineConfig.of({"token_budgets": 64}, "Critic")


def test_a_critic_has_no_sampling_and_no_rollout():
    assert not {"sampling", "rollout", "value_head"} & set(CriticConfig.model_fields)
    with pytest.raises(ConfigError, match="rollout"):
        CriticConfig.parse({"rollout": {"engine": "local"}}, where="critic")


def test_what_belongs_to_a_model_is_refused_for_a_reward_that_is_none():
    with pytest.raises(ConfigError, match="RewardModel: tokenizer, config belong to a model"):
        RewardModel(lambda sample: 1.0, "a tokenizer", config={"dtype": "float32"})
