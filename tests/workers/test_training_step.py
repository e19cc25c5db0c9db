"""One worker in one process: what a mini-batch is divided by, which metrics it has, and steps that must not happen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from small_run import write_run

from megatron_rl.algorithms import DPO, KTO, SFT
from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.workers import Actor
from megatron_rl.workers.loss import LossInputs, LossOutput

PAIRS = [([1, 5, 6, 7], [1, 5, 8]), ([1, 9, 10], [1, 9, 11, 4]), ([1, 3, 4], [1, 3, 5])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_run(folder)
    return folder / "model"


@pytest.fixture
def actor(folder) -> Actor:
    config = Actor.Config(optimizer=OptimizerConfig(learning_rate=1e-2), token_budget=16)
    return Actor(str(folder), AutoTokenizer.from_pretrained(folder), config=config)


def pair_batch(masks: str = "none") -> Batch:
    """Three pairs; of the last one no token is trained on: its mask is empty, or only at its sequences' beginning."""
    rows = [row for pair in PAIRS for row in pair]
    kept = [[0, 0, *[1] * (len(row) - 2)] for row in rows]
    for i in (4, 5):
        kept[i] = [int(masks == "first"), 0, 0]
    return Batch.from_sequences(rows, kept)


def measure(algorithm: DPO, batch: Batch) -> dict[str, float]:
    algorithm.data_stages()[0].run(batch)
    return algorithm.evaluate(batch)


# --- denominators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["none", "first"])
def test_a_pair_without_trained_tokens_counts_not_at_all(actor, masks):
    algorithm = DPO(actor, reference_free=True)
    with_empty, without = measure(algorithm, pair_batch(masks)), measure(algorithm, pair_batch().select(range(4)))
    assert with_empty["loss/total"] == pytest.approx(with_empty["loss/preference"], rel=1e-6)
    assert with_empty["loss/total"] == pytest.approx(without["loss/total"], rel=1e-6)


def test_the_step_divides_by_the_same_pairs(actor):
    batch = pair_batch()
    DPO(actor, reference_free=True).update()(batch)
    assert batch.metrics["loss/total"] == pytest.approx(batch.metrics["loss/preference"], rel=1e-6)


# --- metrics ---------------------------------------------------------------------------------------------------------


def labelled(labels: list[bool]) -> Batch:
    batch = Batch.from_sequences(
        [row for pair in PAIRS for row in pair], [[0, 0, *[1] * (len(r) - 2)] for p in PAIRS for r in p]
    )
    batch.sequences["labels"] = torch.tensor(labels)
    return batch


def test_both_classes_have_margins_and_accuracies(actor):
    algorithm = KTO(actor, reference=Shifted(), estimate_kl=False)
    batch = algorithm.update()(labelled([True, False] * 3))
    for metrics in (batch.metrics, algorithm.evaluate(labelled([True, False] * 3))):
        assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
        assert 0.0 <= metrics["rewards/accuracies"] <= 1.0


def test_a_mean_of_nothing_is_no_metric(actor):
    batch = KTO(actor, reference=Shifted(), estimate_kl=False).update()(labelled([True] * 6))
    assert "rewards/chosen" in batch.metrics
    assert not {"rewards/rejected", "rewards/margins"} & set(batch.metrics)


class Shifted:
    """A reference whose log-probabilities are all -2."""

    def logprobs(self, write: str) -> Stage:
        def run(batch: Batch) -> None:
            batch.tokens[write] = torch.full((batch.num_tokens,), -2.0)

        return Stage("reference.logprobs", run, reads=("input_ids",), writes=(write,))


# --- numbers that are not finite -------------------------------------------------------------------------------------


def everything(actor: Actor) -> dict[str, Tensor]:
    """Weights and optimizer state as bytes: NaN equals itself."""
    tensors = dict(actor.engine.tensors())
    for group, parameters in enumerate(actor.engine.optimizer.optimizer.state.items()):
        tensors |= {f"state {group} {key}": torch.as_tensor(value) for key, value in parameters[1].items()}
    return {name: tensor.detach().clone().contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}


def final_norm(actor: Actor) -> Tensor:
    (weight,) = (w for name, w in actor.engine.tensors().items() if name.endswith("final_layernorm.weight"))
    return weight


def assert_untouched(actor: Actor, before: dict[str, Tensor]) -> None:
    after = everything(actor)
    assert set(after) == set(before)
    assert any(name.startswith("state") and name.endswith("exp_avg") for name in before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def undefined_loss(inputs: LossInputs) -> LossOutput:
    return LossOutput((inputs.logprobs * inputs.mask).sum() * float("nan"))


def undefined_gradient(inputs: LossInputs) -> LossOutput:
    """0, with 0 times infinity as its gradient."""
    return LossOutput((inputs.logprobs - inputs.logprobs.detach()).square().sum().sqrt())


@pytest.mark.parametrize("cause", ["weight", "loss"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_or_optimizer_state_changes(actor, cause):
    algorithm = SFT(actor)
    algorithm.update()(labelled([True] * 6))
    if cause == "weight":
        with torch.no_grad():
            final_norm(actor).view(-1)[0] = float("nan")
    else:
        algorithm.loss = undefined_loss  # type: ignore[method-assign]
    before, rate = everything(actor), actor.engine.optimizer.param_groups[0]["lr"]
    with pytest.raises(FloatingPointError, match=r"actor: the loss of optimizer step 1 is not finite"):
        algorithm.update()(labelled([True] * 6))
    assert_untouched(actor, before)
    assert actor.engine.optimizer.param_groups[0]["lr"] == rate
    assert actor.engine.num_steps == 1


def test_a_gradient_that_is_not_finite_stops_before_any_weight_or_optimizer_state_changes(actor):
    algorithm = SFT(actor)
    algorithm.update()(labelled([True] * 6))
    algorithm.loss = undefined_gradient  # type: ignore[method-assign]
    before = everything(actor)
    with pytest.raises(FloatingPointError, match=r"actor: the gradient of optimizer step 1 is not finite"):
        algorithm.update()(labelled([True] * 6))
    assert_untouched(actor, before)


def test_a_reference_that_is_not_finite_stops_before_the_step(actor):
    class Broken(Shifted):
        def logprobs(self, write: str) -> Stage:
            def run(batch: Batch) -> None:
                batch.tokens[write] = torch.full((batch.num_tokens,), float("nan"))

            return Stage("reference.logprobs", run, reads=("input_ids",), writes=(write,))

    SFT(actor).update()(labelled([True] * 6))
    before = everything(actor)
    with pytest.raises(ValueError, match=r"ref_logprobs = nan at token 2 of sequence 0"):
        KTO(actor, reference=Broken(), estimate_kl=False).update()(labelled([True, False] * 3))
    assert_untouched(actor, before)
