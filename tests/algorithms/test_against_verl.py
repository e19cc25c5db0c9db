"""Our formulas against verl's own functions on the same inputs. Skipped where verl is not installed.

verl imports Ray and much else that these pure functions never call; where such a package is missing, an empty stand-in
takes its place for the import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch
from algorithms.ragged import make_inputs
from algorithms.rectangular import BATCH, TIME, as_rows, assert_same, make_matrices, ours
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import ALGORITHMS, PPO
from megatron_rl.algorithms.advantages import (
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    overlong_penalty,
)
from megatron_rl.algorithms.kl import AdaptiveKL, kl_penalty
from megatron_rl.algorithms.moments import whiten
from megatron_rl.algorithms.rollout_correction import RolloutCorrection, correct
from megatron_rl.algorithms.step_correction import correct_step
from megatron_rl.batch import Batch
from megatron_rl.ops.gae import gae

UNUSED = ("ray", "hydra", "codetiming", "torchdata", "peft", "pyvers", "orjson", "pylatexenc", "dill")


class EmptyStandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the missing packages of `UNUSED` as mocks."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def verl():
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    finder = EmptyStandIn()
    sys.meta_path.append(finder)  # last, so that it only takes what is really missing
    try:
        import verl.trainer.ppo.core_algos as core_algos
        from verl.workers.config import ActorConfig
    finally:
        sys.meta_path.remove(finder)
    core_algos.TestedConfig = ActorConfig
    return core_algos


def config_of(verl, **values):
    config = MagicMock(spec=verl.TestedConfig)
    values = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, **values}
    for name, value in values.items():
        setattr(config, name, value)
    config.get = values.get
    config.global_batch_info = values.get("global_batch_info", {})
    return config


def build(name: str, **config):
    return ALGORITHMS[name](actor=StandInWorker(), old_logprobs="recompute", **config)


def theirs(function, matrices, mode, config):
    logprobs = matrices["logprobs"].clone().requires_grad_()
    loss, _ = function(matrices["old_logprobs"], logprobs, matrices["advantages"], matrices["mask"], mode, config)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-length"]
)
def test_clipped_loss_and_every_aggregation(verl, mode, seed):
    matrices = make_matrices(seed, spread=1.0)
    config = config_of(verl, clip_ratio_high=0.28, clip_ratio_c=3.0)
    name = "seq-mean-token-sum-norm" if mode == "fixed-length" else mode
    algorithm = build("grpo", clip_high=0.28, dual_clip=3.0, loss_aggregation=mode, norm_length=TIME)
    found = ours(algorithm.loss, matrices, "old_logprobs", "advantages")
    assert_same(found, *theirs(verl.compute_policy_loss_vanilla, matrices, name, config))


@pytest.mark.parametrize("seed", range(3))
def test_gspo_gmpo_cispo_and_sapo(verl, seed):
    matrices = make_matrices(seed)
    cases = [
        ("gspo", {"clip_low": 0.1, "clip_high": 0.2}, "compute_policy_loss_gspo", "seq-mean-token-mean"),
        ("gmpo", {"clip_low": 0.3, "clip_high": 0.3}, "compute_policy_loss_geo_mean", "token-mean"),
        ("cispo", {"clip_low": 0.2, "clip_high": 0.3}, "compute_policy_loss_cispo", "token-mean"),
        ("sapo", {}, "compute_policy_loss_sapo", "seq-mean-token-mean"),
    ]
    for name, settings, function, mode in cases:
        config = config_of(
            verl,
            clip_ratio_low=settings.get("clip_low", 0.2),
            clip_ratio_high=settings.get("clip_high", 0.2),
            tau_pos=1.0,
            tau_neg=1.05,
        )
        found = ours(build(name, **settings).loss, matrices, "old_logprobs", "advantages")
        assert_same(found, *theirs(vars(verl)[function], matrices, mode, config))


def test_value_loss(verl):
    matrices = make_matrices(4)
    critic = PPO(actor=StandInWorker(), critic=StandInWorker("critic"), value_clip=0.3).critic_loss
    predicted = matrices["current_values"].clone().requires_grad_()
    loss, _ = verl.compute_value_loss(predicted, matrices["returns"], matrices["values"], matrices["mask"], 0.3)
    gradient = torch.autograd.grad(loss, predicted)[0]
    names = ("values", "current_values", "returns")
    assert_same(ours(critic, matrices, *names, by="current_values"), loss.detach(), gradient)


def test_kl_estimators(verl):
    matrices = make_matrices(5)
    for name in ("k1", "k2", "k3"):
        expected = verl.kl_penalty(matrices["logprobs"], matrices["ref_logprobs"], name)
        torch.testing.assert_close(kl_penalty(matrices["logprobs"], matrices["ref_logprobs"], name), expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9)])
def test_gae_and_whitening(verl, gamma, lam):
    matrices = make_matrices(6)
    rewards, values, mask = (matrices[name] for name in ("rewards", "values", "mask"))
    advantages, returns = verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    steps = mask.bool()
    cu_seqlens = torch.arange(BATCH + 1) * TIME
    found, found_returns = gae(rewards.flatten(), values.flatten(), steps.flatten(), cu_seqlens, gamma, lam)
    torch.testing.assert_close(found_returns.view(BATCH, TIME)[steps], returns[steps])
    whitened = whiten(found, steps.flatten()).view(BATCH, TIME)
    torch.testing.assert_close(whitened[steps], advantages[steps])


def test_reinforce_pp_rewards_to_go(verl):
    matrices = make_matrices(7)
    config = MagicMock(gamma=0.95)
    rewards, mask = matrices["rewards"], matrices["mask"]
    expected, _ = verl.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config)
    steps = mask.bool().flatten()
    cu_seqlens = torch.arange(BATCH + 1) * TIME
    to_go, _ = gae(rewards.flatten(), torch.zeros_like(rewards).flatten(), steps, cu_seqlens, 0.95, 1.0)
    torch.testing.assert_close(whiten(to_go, steps)[steps], expected.flatten()[steps])


def test_group_baselines(verl):
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 3.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = torch.ones(BATCH, 1, dtype=torch.float64)
    for normalize in (True, False):
        expected, _ = verl.compute_grpo_outcome_advantage(
            rewards.unsqueeze(1).clone(), mask, groups.numpy(), norm_adv_by_std_in_grpo=normalize
        )
        found = group_advantages(rewards, groups, normalize_std=normalize)
        torch.testing.assert_close(found, expected.squeeze(1).double(), rtol=1e-6, atol=1e-6)
    lengths = torch.tensor([1, 4, 2, 3, 3, 5])
    padded = (torch.arange(5) < lengths[:, None]).double()
    placed = torch.zeros(BATCH, 5, dtype=torch.float64)
    placed[:, 0] = rewards
    expected, _ = verl.compute_opo_outcome_advantage(placed, padded, groups.numpy())
    torch.testing.assert_close(length_weighted_advantages(rewards, groups, lengths), expected[:, 0])
    expected, _ = verl.compute_rloo_outcome_advantage(rewards.unsqueeze(1).clone(), mask, groups.numpy())
    found = leave_one_out_advantages(rewards, groups)
    torch.testing.assert_close(found, expected.squeeze(1).double(), rtol=1e-6, atol=1e-6)


def test_reinforce_pp_baseline_advantages(verl):
    matrices = make_matrices(8)
    mask, rewards, groups = matrices["mask"], matrices["rewards"][:, 0], torch.tensor([0, 0, 0, 1, 1, 1])
    at_first = torch.zeros(BATCH, TIME, dtype=torch.float64)
    at_first[:, 0] = rewards
    expected, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(at_first, mask, groups.numpy())
    batch = Batch.from_sequences([[1] * TIME] * BATCH, mask.int().tolist())
    batch.sequences |= {"rewards": rewards, "groups": groups}
    build("reinforce++-baseline").prepare(batch)
    torch.testing.assert_close(batch["advantages"].view(BATCH, TIME) * mask, expected * mask)


def test_adaptive_kl_coefficient(verl):
    theirs, mine = verl.AdaptiveKLController(0.2, 6.0, 10_000), AdaptiveKL(0.2, 6.0, 10_000)
    for kl, samples in ((1.0, 64), (6.3, 128), (20.0, 256), (5.9, 64)):
        theirs.update(kl, samples)
        mine.update(kl, samples)
        assert mine.coefficient == pytest.approx(theirs.value, rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "spread"), [("truncate", 0.4), ("truncate", 30.0), ("mask", 0.4), ("mask", 0.8)])
def test_weights_against_the_mismatch_of_trainer_and_engine(verl, level, mode, spread):
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    matrices = make_matrices(9, spread=spread)
    mask = matrices["mask"]
    log_ratio = (matrices["logprobs"] - matrices["old_logprobs"]) * mask
    threshold = 1.5 if mode == "truncate" else "0.5_1.5"
    expected, _ = compute_rollout_correction_weights(log_ratio, mask, level, threshold)
    lower = {"lower": 0.5} if mode == "mask" else {}
    correction = RolloutCorrection(level=level, mode=mode, upper=1.5, **lower)
    found = correct(make_inputs(as_rows(matrices)), log_ratio.flatten(), correction).weights
    assert len(expected.unique()) > 2 or spread > 1
    torch.testing.assert_close(found.view(BATCH, TIME) * mask, expected)


def flat_batch(matrices) -> Batch:
    """One prompt token before each row, whose numbers are 0."""
    mask = torch.cat([torch.zeros(BATCH, 1), matrices["mask"]], dim=1)
    batch = Batch.from_sequences([[1] * (TIME + 1)] * BATCH, mask.int().tolist())
    for target, name in (("old_logprobs", "logprobs"), ("rollout_logprobs", "old_logprobs")):
        batch.tokens[target] = torch.cat([torch.zeros(BATCH, 1), matrices[name]], dim=1).flatten()
    return batch


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_normalised_over_the_batch(verl, level):
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    matrices = make_matrices(10)
    mask, batch = matrices["mask"], flat_batch(matrices)
    log_ratio = (matrices["logprobs"] - matrices["old_logprobs"]) * mask
    expected, _ = compute_rollout_correction_weights(log_ratio, mask, level, 1.5, rollout_is_batch_normalize=True)
    correct_step(batch, "old_logprobs", RolloutCorrection(level=level, upper=1.5, normalize=True), None)
    found = batch["correction_weights"].view(BATCH, TIME + 1)[:, 1:]
    torch.testing.assert_close(found * mask, expected * mask)


@pytest.mark.parametrize(
    ("level", "mode"), [("token", "token_k1"), ("sequence", "seq_sum_k1"), ("geometric", "seq_mean_k1")]
)
def test_rejection_narrows_the_mask(verl, level, mode):
    """Its bounds are on rollout over trainer."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    matrices = make_matrices(11)
    mask, batch = matrices["mask"], flat_batch(matrices)
    log_ratio = (matrices["logprobs"] - matrices["old_logprobs"]) * mask
    expected, _ = compute_rollout_rejection_mask(log_ratio, mask, mode, "0.8_1.3")
    config = {"reject": level, "reject_lower": 1 / 1.3, "reject_upper": 1 / 0.8, "denominators": "kept"}
    correct_step(batch, "old_logprobs", RolloutCorrection(**config), None)
    assert 0 < expected.sum() < mask.sum()
    assert torch.equal(batch["response_mask"].view(BATCH, TIME + 1)[:, 1:].double(), expected.double())


def test_soft_overlong_penalty(verl):
    """verl's reward manager for DAPO, on responses up to the limit (verl's penalty goes on beyond it)."""
    dapo = pytest.importorskip("verl.workers.reward_manager.dapo")
    lengths, most, cache = [1, 3, 4, 5, 7, 8], 8, 4
    manager = MagicMock(max_resp_len=most, num_examine=0)
    manager.overlong_buffer_cfg = MagicMock(enable=True, len=cache, penalty_factor=1.0, log=False)
    manager.compute_score = lambda **_: 0.0
    manager._extract_reward_from_rm_scores = lambda *_: None
    manager.tokenizer.eos_token = manager.tokenizer.decode.return_value = "."
    rows = [(torch.tensor([1] * n + [0] * (most - n)), torch.ones(most, dtype=torch.long)) for n in lengths]
    items = [
        MagicMock(
            batch={
                "prompts": torch.ones(1),
                "responses": responses,
                "attention_mask": torch.cat([torch.ones(1, dtype=torch.long), mask]),
            }
        )
        for mask, responses in rows
    ]
    data = MagicMock()
    data.__len__.return_value, data.__getitem__.side_effect = len(items), items.__getitem__
    data.batch = {"responses": torch.stack([responses for _, responses in rows])}
    penalties = dapo.DAPORewardManager.__call__(manager, data).sum(1)
    torch.testing.assert_close(overlong_penalty(torch.tensor(lengths), most, cache), penalties)
