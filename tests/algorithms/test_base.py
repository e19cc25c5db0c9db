"""`BaseAlgorithm`: its flow, what each configuration leaves out, its errors, and an algorithm in one class."""

from __future__ import annotations

import math

import pytest
import torch
from algorithms.stand_ins import StandInWorker
from algorithms.test_policy_kin import make_samples

from megatron_rl.algorithms import ALGORITHMS, DPO, GRPO, BaseAlgorithm
from megatron_rl.algorithms.pack_samples import NotFiniteError, require_finite
from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.workers.loss import LossOutput


def scored_batch() -> Batch:
    batch = Batch(samples=make_samples())
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples])
    return batch


def stage_names(algorithm: BaseAlgorithm) -> list[str]:
    return [stage.name for stage in algorithm.update().stages]


def grpo(**config) -> GRPO:
    return GRPO(actor=StandInWorker(), reference=StandInWorker("reference"), **config)


def test_single_on_policy_step_needs_no_pass_over_old_logprobs():
    assert stage_names(grpo(kl_coefficient=0)) == ["batch.pack", "grpo.prepare", "actor.optimize"]


def test_several_optimizer_steps_recompute_old_logprobs():
    assert stage_names(grpo(kl_coefficient=0, num_mini_batches=2))[1] == "actor.logprobs"


def test_rollout_logprobs_can_serve_as_old_ones():
    algorithm = grpo(kl_coefficient=0, num_mini_batches=2, old_logprobs="rollout")
    assert stage_names(algorithm) == ["batch.pack", "grpo.prepare", "actor.optimize"]
    assert algorithm.loss_fields == ("rollout_logprobs", "advantages")


def test_reference_runs_only_with_a_kl_term_and_before_prepare_when_it_is_in_the_reward():
    assert stage_names(grpo()) == ["batch.pack", "reference.logprobs", "grpo.prepare", "actor.optimize"]
    in_reward = grpo(kl_in="reward")
    assert stage_names(in_reward)[1:4] == ["actor.logprobs", "reference.logprobs", "grpo.prepare"]
    assert "ref_logprobs" not in in_reward.loss_fields


def test_update_hands_the_worker_the_declared_fields_and_frees_the_rest():
    algorithm = grpo(num_epochs=2, correction={"level": "token"}, seed=5)
    batch = algorithm.update()(scored_batch())
    (call,) = algorithm.actor.calls
    read = {"old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs", "staleness", "response_starts"}
    assert set(call["fields"]) == read
    assert (call["num_epochs"], call["num_mini_batches"], call["with_entropy"], call["seed"]) == (2, 1, True, 5)
    assert algorithm.step == 1
    assert "advantages" not in batch
    assert len(batch.samples) == 8
    algorithm.update()(scored_batch())
    assert algorithm.actor.calls[1]["seed"] == 6
    assert {"advantages/mean", "advantages/std", "rewards/mean", "rewards/std"} <= set(batch.metrics)
    assert batch.metrics["rewards/mean"] == pytest.approx(8.5 / 8)


def test_an_algorithm_is_one_class_with_prepare_and_loss():
    class Reinforce(BaseAlgorithm):
        """Reward-weighted log-likelihood."""

        name = "reinforce"

        def prepare(self, batch):
            batch.tokens["advantages"] = batch["rewards"][batch.sequence_ids] * batch["response_mask"]

        def loss(self, inputs):
            per_token = -inputs.fields["advantages"] * inputs.logprobs * inputs.mask
            return LossOutput(per_token.sum() / inputs.totals.tokens, {"loss/policy": inputs.token_metric(per_token)})

    algorithm = Reinforce(actor=StandInWorker(), num_mini_batches=1)
    assert stage_names(algorithm) == ["batch.pack", "reinforce.prepare", "actor.optimize"]
    algorithm.update()(scored_batch())
    assert algorithm.actor.calls[0]["loss"] == algorithm.loss


def test_every_registered_algorithm_documents_each_setting():
    assert {"grpo", "dr-grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "rloo", "reinforce++", "ppo"} <= set(ALGORITHMS)
    for name in ALGORITHMS:
        for key, field in ALGORITHMS[name].Config.model_fields.items():
            assert field.description, f"{name}: {key} has no docstring"


def test_a_sample_without_reward_is_named():
    batch = Batch(samples=make_samples())
    batch.samples[3].reward = None
    with pytest.raises(ValueError, match=r"1 of 8 samples have no reward, the first is \[3\]"):
        grpo().pack_stage().run(batch)


def test_a_reward_that_is_not_finite_names_its_sample_and_prompt():
    batch = Batch(samples=make_samples())
    batch.samples[2].reward = math.nan
    with pytest.raises(ValueError, match=r"reward nan of sample 2 \(prompt 0\)"):
        grpo().pack_stage().run(batch)


def test_nan_logprobs_are_found_on_the_mask_only_and_named_by_sequence_and_token():
    batch = Batch.from_sequences([[1, 2], [3, 4, 5]], [[0, 1], [0, 1, 1]])
    batch.tokens["ref_logprobs"] = torch.tensor([math.nan, -1.0, math.nan, -1.0, -math.inf])
    with pytest.raises(ValueError, match=r"ref_logprobs = -inf at token 2 of sequence 1"):
        require_finite(batch, ["ref_logprobs"])
    batch.tokens["ref_logprobs"][4] = -2.0
    require_finite(batch, ["ref_logprobs"])


def test_a_reference_that_gives_nan_is_named_before_anything_is_trained():
    class Broken(StandInWorker):
        def logprobs(self, write: str) -> Stage:
            return self._token_stage("logprobs", write, math.nan)

    actor = StandInWorker()
    algorithm = DPO(actor=actor, reference=Broken("reference"))
    batch = Batch.from_sequences([[1, 2], [1, 3]], [[0, 1], [0, 1]])
    with pytest.raises(NotFiniteError, match=r"ref_logprobs = nan at token 1 of sequence 0"):
        algorithm.update()(batch)
    assert actor.calls == []
