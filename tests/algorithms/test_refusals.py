"""Settings that no algorithm accepts: out of range, without meaning, or ignored by the one they are given to."""

from __future__ import annotations

import math

import pytest
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.config import ConfigError

NAN, INF = math.nan, math.inf
CLIPPED = ("grpo", "dapo", "gspo", "gmpo", "cispo", "rloo", "ppo")
TIED = ("dpo", "kto", "bco", "simpo", "cpo", "orpo")
OUT_OF_RANGE = [
    *((name, {field: -1.0}) for name in CLIPPED for field in ("clip_low", "clip_high")),
    *((name, {"beta": beta}) for name in TIED for beta in (0.0, -0.1, NAN, INF)),
    *(("dpo", {"loss": loss, "beta": 0.0}) for loss in ("ipo", "sppo_hard")),
    ("dpo", {"loss": "discopop", "discopop_tau": 0.0}),
    ("dpo", {"loss": "robust", "label_smoothing": 0.5}),
    ("dpo", {"loss": {"sigmoid": 1.0, "sft": -1.0}}),
    ("dpo", {"f_divergence": "alpha", "f_alpha": 0.0}),
    ("dpo", {"f_divergence": "alpha", "f_alpha": 1.0}),
    ("dpo", {"f_divergence": "chi2"}),
    ("dpo", {"ld_alpha": -0.1}),
    ("dpo", {"ld_alpha": NAN}),
    ("simpo", {"label_smoothing": 0.5}),
    ("simpo", {"gamma": NAN}),
    ("simpo", {"sft_weight": -1.0}),
    ("cpo", {"sft_weight": -1.0}),
    ("kto", {"desirable_weight": -1.0}),
    ("bco", {"undesirable_weight": NAN}),
    ("sapo", {"tau_positive": 0.0}),
    ("sapo", {"tau_negative": -1.0}),
    ("sft", {"norm_length": -3}),
    ("sft", {"norm_length": 0}),
    ("dr-grpo", {"norm_length": 0}),
    ("dr-grpo", {}),
    ("ppo", {"value_clip": -0.2}),
    ("ppo", {"value_clip": NAN}),
    ("ppo", {"value_coefficient": NAN}),
    ("ppo", {"critic_warmup_steps": -1}),
    ("ppo", {"gamma": 1.1}),
    ("ppo", {"lam": NAN}),
    ("reinforce++", {"gamma": -0.1}),
    ("grpo", {"entropy_coefficient": NAN}),
    ("grpo", {"entropy_coefficient": INF}),
    ("grpo", {"kl_coefficient": -0.1}),
    ("grpo", {"kl_coefficient": NAN}),
    ("grpo", {"dual_clip": 0.5}),
    ("grpo", {"dual_clip": NAN}),
    ("grpo", {"num_epochs": 0}),
    ("grpo", {"correction": {"level": "token", "mode": "mask", "lower": 3.0, "upper": 2.0}}),
    ("grpo", {"correction": {"level": "token", "upper": -1.0}}),
    ("grpo", {"correction": {"level": "token", "mode": "mask", "lower": -1.0}}),
    ("grpo", {"correction": {"warn_above": NAN}}),
    ("grpo", {"correction": {"veto": -1e-4}}),
    ("grpo", {"correction": {"reject": "token", "reject_lower": 3.0}}),
    ("grpo", {"correction": {"reject": "token", "reject_upper": INF}}),
    ("dapo", {"overlong_tokens": 0}),
    ("dapo", {"overlong_tokens": 256, "overlong_cache": 0}),
    ("dapo", {"overlong_tokens": 256}),  # the default cache is longer than that
    ("dapo", {"overlong_weight": -1.0}),
    ("reward-model", {"center_coefficient": -0.1}),
    ("reward-model", {"pad_token_id": -1}),
]  # fmt: skip
MEANINGLESS = [
    ("dpo", {"loss": "sigmiod"}, "Did you mean 'sigmoid'"),
    ("dpo", {"loss": {}}, "no term"),
    ("dpo", {"loss": "exo_pair"}, "needs label_smoothing above 0"),
    ("dpo", {"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect on ['hinge']"),
    ("dpo", {"loss": {"sigmoid": 1.0, "hinge": 1.0}, "label_smoothing": 0.1}, "has no effect on ['hinge']"),
    ("dpo", {"loss": "sft", "label_smoothing": 0.1}, "has no effect on ['sft']"),
    ("dpo", {"ipo_length_norm": True}, "loss='sigmoid' does not use ipo_length_norm=True: it is for ipo"),
    ("dpo", {"discopop_tau": 0.1}, "it is for discopop"),
    ("dpo", {"f_alpha": 0.3}, "f_divergence='reverse_kl' does not use f_alpha=0.3: it is for alpha"),
    ("dpo", {"loss": "aot", "f_divergence": "js"}, "loss=['aot'] does not use f_divergence='js'"),
    ("dpo", {"loss": {"sigmoid": 1.0, "nca_pair": 1.0}, "f_divergence": "js"}, "loss=['nca_pair'] does not use"),
    ("dpo", {"loss": {"sigmoid": 1.0, "sft": 1.0}, "ld_alpha": 0.5}, "sft does not use ld_alpha=0.5"),
    ("gspo", {"loss_aggregation": "token-mean"}, "averages over responses"),
    ("gspo", {"correction": {"level": "token"}}, "one ratio per response"),
    ("rloo", {"correction": {"level": "token"}}, "one ratio per response"),
    ("rloo", {"loss_aggregation": "token-mean"}, "RLOO does not use loss_aggregation='token-mean'"),
    ("rloo", {"normalize_std": True}, "RLOO does not use normalize_std=True"),
    ("reinforce++", {"normalize_std": True}, "REINFORCE++ does not use normalize_std=True"),
    ("reinforce++-baseline", {"normalize_std": True}, "REINFORCE++-baseline does not use normalize_std=True"),
    ("reinforce++", {"normalize_advantages": True}, "REINFORCE++ does not use normalize_advantages=True"),
    ("opo", {"normalize_std": "batch"}, "OPO does not use normalize_std='batch'"),
    ("grpo", {"normalize_std": "world"}, "normalize_std"),
    ("gmpo", {"dual_clip": 3.0}, "GMPO does not use dual_clip=3.0"),
    ("cispo", {"dual_clip": 3.0}, "CISPO does not use dual_clip=3.0"),
    ("sapo", {"dual_clip": 3.0}, "SAPO does not use dual_clip=3.0"),
    ("sapo", {"clip_high": 0.3}, "SAPO does not use clip_high=0.3"),
    ("grpo", {"dual_clip": 0.5}, "must be above 1"),
    ("grpo", {"correction": {"lower": 0.5}}, "level='off' does not use lower=0.5"),
    ("grpo", {"correction": {"normalize": True}}, "level='off' does not use normalize=True"),
    ("grpo", {"correction": {"level": "token", "reject_upper": 3.0}}, "reject='off' does not use reject_upper=3.0"),
    ("grpo", {"correction": {"level": "token", "denominators": "kept"}}, "all tokens are kept"),
    ("grpo", {"old_logprobs": "current", "correction": {"level": "token", "normalize": True}}, "leave it at auto"),
    ("gspo", {"correction": {"reject": "token"}}, "one ratio per response"),
    ("rloo", {"correction": {"reject": "token"}}, "one ratio per response"),
    ("dapo", {"overlong_tokens": 256}, "overlong_cache=4096 is above overlong_tokens=256"),
]


def build(name: str, config: dict) -> None:
    critic = {"critic": StandInWorker("critic")} if name == "ppo" else {}
    ALGORITHMS[name](StandInWorker(), config=config, **critic)


@pytest.mark.parametrize(("name", "config"), OUT_OF_RANGE, ids=lambda part: str(part))
def test_a_setting_out_of_range_is_refused_by_name(name, config):
    with pytest.raises(ConfigError) as error:
        build(name, config)
    assert any(field in str(error.value) for field in ("norm_length", *config))


@pytest.mark.parametrize(("name", "config", "message"), MEANINGLESS, ids=lambda part: str(part)[:50])
def test_a_setting_that_would_be_ignored_is_refused_with_who_ignores_it(name, config, message):
    with pytest.raises(ConfigError) as error:
        build(name, config)
    assert message in str(error.value)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_config_that_changes_a_default_keeps_the_range(name):
    record = ALGORITHMS[name].Config
    for parent in record.__mro__[1:]:
        for field, info in getattr(parent, "model_fields", {}).items():
            kept = record.model_fields[field].metadata
            assert [str(bound) for bound in kept] == [str(bound) for bound in info.metadata], f"{parent}.{field}"


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_defaults_written_out_are_accepted(name):
    needed = {"dr-grpo": {"norm_length": 16}}.get(name, {})
    kind = ALGORITHMS[name]
    given = kind.Config.parse(needed)
    assert kind.Config.parse(given.model_dump()) == given
