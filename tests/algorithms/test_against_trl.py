"""Our losses against the loss methods of TRL's trainers on the same log-probabilities. Skipped where TRL is missing.

The trainers' own `_compute_loss` runs, with a model that returns given log-probabilities and a trainer object that has
only the settings; nothing of the formulas is copied here.
"""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from algorithms.ragged import make_inputs
from algorithms.rectangular import BATCH, TIME, assert_same, make_matrices, ours
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import ALGORITHMS, DPO, KTO, RewardModelling
from megatron_rl.algorithms.pair_fields import length_weights
from megatron_rl.batch import Batch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
ORDER = [0, 2, 4, 1, 3, 5]  # TRL stacks all chosen, then all rejected; we alternate


def accelerator() -> SimpleNamespace:
    def same(value, *args, **keywords):
        return value

    return SimpleNamespace(device="cpu", num_processes=1, gather=same, gather_for_metrics=same, reduce=same)


def output_of(logprobs: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )


def with_first_token(mask: torch.Tensor) -> torch.Tensor:
    """TRL's masks have one more column: the first token, which nothing predicts."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()


def trainer_of(**settings) -> MagicMock:
    trainer = MagicMock()
    trainer.accelerator = accelerator()
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def trl_dpo(matrices, loss_types, weights, beta, smoothing, f_divergence="reverse_kl", f_alpha=0.5, ld_alpha=None):
    from trl.trainer.dpo_trainer import DPOTrainer

    mask, order = matrices["mask"][ORDER], ORDER
    logprobs = matrices["logprobs"].clone().requires_grad_()
    reference = output_of(matrices["ref_logprobs"][order], mask)
    trainer = trainer_of(
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=False,
        f_divergence_type=DIVERGENCES.get(f_divergence, f_divergence),
        f_alpha_divergence_coef=1.0 - f_alpha,
        loss_types=loss_types,
        loss_weights=weights,
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _tp_size=1,
        _total_train_tokens=0,
    )
    trainer.args.discopop_tau = 0.05
    trainer.ref_model = lambda **_: reference
    completion_mask = with_first_token(mask)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: output_of(logprobs[order], mask), inputs, False)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


DPO_CASES = [
    (["sigmoid"], [1.0], 0.1, 0.0, {}),
    (["sigmoid_norm"], [1.0], 2.0, 0.0, {}),
    (["hinge"], [1.0], 0.5, 0.0, {}),
    (["ipo"], [1.0], 0.3, 0.0, {"ipo_length_norm": True}),
    (["exo_pair"], [1.0], 0.1, 1e-3, {}),
    (["nca_pair"], [1.0], 0.1, 0.0, {}),
    (["robust"], [1.0], 0.1, 0.2, {}),
    (["bco_pair"], [1.0], 0.1, 0.0, {}),
    (["sppo_hard"], [1.0], 0.1, 0.0, {}),
    (["apo_zero"], [1.0], 0.1, 0.0, {}),
    (["apo_down"], [1.0], 0.1, 0.0, {}),
    (["discopop"], [1.0], 0.1, 0.0, {}),
    (["sigmoid", "bco_pair", "hinge"], [0.8, 0.2, 0.5], 0.1, 0.0, {}),
    (["aot"], [1.0], 0.3, 0.1, {}),
    (["aot_unpaired"], [1.0], 0.3, 0.1, {}),
    (["sigmoid"], [1.0], 0.3, 0.0, {"f_divergence": "forward_kl"}),
    (["sigmoid_norm"], [1.0], 2.0, 0.0, {"f_divergence": "js"}),
    (["ipo"], [1.0], 0.3, 0.0, {"f_divergence": "js", "ipo_length_norm": True}),
    (["hinge"], [1.0], 0.3, 0.0, {"f_divergence": "alpha", "f_alpha": 0.3}),
]


@pytest.mark.parametrize("case", DPO_CASES, ids=lambda case: "+".join(case[0]))
def test_dpo_losses(case):
    names, weights, beta, smoothing, extra = case
    matrices = make_matrices(1, spread=1.0)
    loss = names[0] if len(names) == 1 else dict(zip(names, weights, strict=True))
    algorithm = DPO(
        actor=StandInWorker(), precomputed_reference=True, loss=loss, beta=beta, label_smoothing=smoothing, **extra
    )
    theirs = {key: value for key, value in extra.items() if key.startswith("f_")}
    single = {key: value.float() for key, value in matrices.items()}  # TRL's alpha divergence is not for float64
    expected = trl_dpo(single if "f_alpha" in extra else matrices, names, weights, beta, smoothing, **theirs)
    tolerance = 1e-5 if "f_alpha" in extra else 1e-6
    assert_same(ours(algorithm.loss, matrices, "ref_logprobs"), *expected, tolerance)


def test_ld_dpo_loss():
    matrices = make_matrices(1, spread=1.0)
    batch = Batch.from_sequences([[1] * (TIME + 1)] * BATCH, with_first_token(matrices["mask"]).tolist())
    matrices["length_weights"] = length_weights(batch, 0.4).view(BATCH, TIME + 1)[:, 1:].double()
    assert {0.4, 1.0} == {round(value, 6) for value in matrices["length_weights"].flatten().tolist()}
    algorithm = DPO(actor=StandInWorker(), precomputed_reference=True, ld_alpha=0.4)
    expected = trl_dpo(matrices, ["sigmoid"], [1.0], 0.1, 0.0, ld_alpha=0.4)
    assert_same(ours(algorithm.loss, matrices, "ref_logprobs", "length_weights"), *expected)


def test_sft_term_agrees_where_chosen_responses_are_equally_long():
    """TRL's term is a mean over the batch's chosen tokens, ours over each response's: the same for equal lengths."""
    matrices = make_matrices(2)
    matrices["mask"] = torch.ones(BATCH, TIME, dtype=torch.float64)
    algorithm = DPO(actor=StandInWorker(), precomputed_reference=True, loss="sft")
    assert_same(ours(algorithm.loss, matrices, "ref_logprobs"), *trl_dpo(matrices, ["sft"], [1.0], 0.1, 0.0))


@pytest.mark.parametrize("estimate_kl", [True, False])
def test_kto_loss(estimate_kl):
    from trl.trainer.kto_trainer import KTOTrainer

    matrices = make_matrices(3)
    labels, kl = torch.tensor([True, False, False, True, True, False]), 0.37
    mask = matrices["mask"]
    logprobs = matrices["logprobs"].clone().requires_grad_()
    reference = output_of(matrices["ref_logprobs"], mask)
    trainer = trainer_of(
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=estimate_kl,
        loss_type="kto" if estimate_kl else "apo_zero_unpaired",
        beta=0.2,
        desirable_weight=1.4,
        undesirable_weight=0.6,
        _tp_size=1,
        _total_train_tokens=0,
    )
    trainer.ref_model = lambda **_: reference
    trainer._compute_kl_logps = lambda model, batch: torch.full((BATCH,), kl if model is policy else 0.0)
    policy = MagicMock(side_effect=lambda **_: output_of(logprobs, mask))
    completion_mask = with_first_token(mask)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "label": labels,
    }
    loss = KTOTrainer._compute_loss(trainer, policy, inputs, False)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    algorithm = KTO(
        actor=StandInWorker(),
        precomputed_reference=True,
        beta=0.2,
        desirable_weight=1.4,
        undesirable_weight=0.6,
        estimate_kl=estimate_kl,
    )
    sequences = {"labels": labels.tolist(), "kl_logratio": [kl] * BATCH}
    assert_same(ours(algorithm.loss, matrices, "ref_logprobs", sequences=sequences), loss.detach(), gradient)


def trl_grpo(matrices, loss_type, **settings):
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs = matrices["logprobs"].clone().requires_grad_()
    delta = settings.pop("delta", None)
    defaults = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 40,
        "_entropy_bonus_enabled": False,
    }
    trainer = trainer_of(**{**defaults, **settings}, loss_type=loss_type)
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=False,
        delta=delta,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, matrices["entropy"], None)
    mask = matrices["mask"].long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": matrices["advantages"][:, 0],
        "old_per_token_logps": matrices["old_logprobs"],
        "ref_per_token_logps": matrices["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


GRPO_CASES = [
    ("grpo", {}, "grpo", {"clip_high": 0.28}),
    ("grpo", {"beta": 0.1}, "grpo", {"clip_high": 0.28, "kl_coefficient": 0.1}),
    ("bnpo", {}, "grpo", {"clip_high": 0.28, "loss_aggregation": "token-mean"}),
    ("dapo", {}, "dapo", {}),
    ("dr_grpo", {}, "dr-grpo", {"clip_high": 0.28, "norm_length": 40}),
    ("sapo", {}, "sapo", {}),
    ("cispo", {"epsilon_high": 1.3}, "cispo", {"clip_high": 0.3}),  # TRL's bound is absolute, ours relative to 1
    ("grpo", {"importance_sampling_level": "sequence"}, "gspo", {"clip_low": 0.2, "clip_high": 0.28}),
]


@pytest.mark.parametrize("case", GRPO_CASES, ids=lambda case: f"{case[2]}-{case[0]}-{len(case[1])}")
def test_grpo_family_losses(case):
    loss_type, settings, name, config = case
    matrices = make_matrices(4)
    algorithm = ALGORITHMS[name](
        actor=StandInWorker(), reference=StandInWorker("reference"), old_logprobs="recompute", **config
    )
    fields = ("old_logprobs", "advantages") + (("ref_logprobs",) if "beta" in settings else ())
    assert_same(ours(algorithm.loss, matrices, *fields), *trl_grpo(matrices, loss_type, **settings))


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_rloo_clips_the_ratio_of_the_whole_response(spread):
    from trl.trainer.rloo_trainer import RLOOTrainer

    matrices = make_matrices(6, spread=spread)
    logprobs = matrices["logprobs"].clone().requires_grad_()
    trainer = trainer_of(aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, matrices["entropy"], None)
    mask = matrices["mask"].long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": matrices["advantages"][:, 0],
        "old_logps": (matrices["old_logprobs"] * mask).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    clipped = (gradient == 0).all(1)
    assert clipped.any() == (spread > 0)
    assert not clipped.all()
    algorithm = ALGORITHMS["rloo"](actor=StandInWorker(), old_logprobs="recompute")
    assert_same(ours(algorithm.loss, matrices, "old_logprobs", "advantages"), loss.detach(), gradient)


def test_sft_loss():
    from trl.trainer.sft_trainer import SFTTrainer

    matrices = make_matrices(7)
    logprobs, mask = matrices["logprobs"].clone().requires_grad_(), matrices["mask"]
    trainer = trainer_of(
        aux_loss_enabled=False, compute_loss_func=None, label_smoother=None, _tp_size=1, _total_train_tokens=0
    )
    trainer.args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    trainer.accelerator.parallelism_config = None
    output = output_of(logprobs, mask)
    output.label_mask = mask
    loss = SFTTrainer.compute_loss(trainer, lambda **_: output, {"attention_mask": mask})
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert_same(ours(ALGORITHMS["sft"](actor=StandInWorker()).loss, matrices), loss.detach(), gradient)


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("center", [None, 0.1])
def test_reward_model_loss(margins, center):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = make_matrices(8)["values"][:, 0].clone().requires_grad_()
    trainer = trainer_of(_tp_size=1, _total_train_tokens=0)
    trainer.args = SimpleNamespace(center_rewards_coefficient=center)
    inputs = {"attention_mask": torch.ones(BATCH, 1)} | ({"margin": torch.tensor(margins)} if margins else {})
    outputs = SimpleNamespace(logits=scores[ORDER].unsqueeze(1))
    loss = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    expected = torch.autograd.grad(loss, scores)[0]

    algorithm = RewardModelling(StandInWorker("critic"), use_margins=bool(margins), center_coefficient=center or 0.0)
    rows = [{"mask": [1], "logprobs": [0.0], "current_values": [value]} for value in scores.tolist()]
    given = make_inputs(rows, sequences={"margins": [m for m in margins for _ in range(2)]} if margins else {})
    output = algorithm.loss(given)
    assert math.isclose(output.loss.item(), loss.item(), rel_tol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(output.loss, given.values)[0], expected, rtol=1e-6, atol=1e-9)


def mean_over_response(matrices, name: str) -> torch.Tensor:
    return (matrices[name] * matrices["mask"]).sum(1) / matrices["mask"].sum(1)


def test_simpo_cpo_and_orpo():
    pytest.importorskip("trl.experimental.cpo")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    matrices = make_matrices(5)
    matrices["logprobs"] = matrices["logprobs"].clamp(max=-0.05)
    logprobs = matrices["logprobs"].clone().requires_grad_()
    averages = mean_over_response(matrices | {"logprobs": logprobs}, "logprobs")
    sums = (logprobs * matrices["mask"]).sum(1)
    likelihood = -averages[0::2].mean()
    simpo = trainer_of(alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.1)
    cpo = trainer_of(alpha=0.0, loss_type="sigmoid", beta=0.1, label_smoothing=0.1)
    expected = {
        "simpo": CPOTrainer.cpo_loss(simpo, averages[0::2], averages[1::2])[0].mean(),
        "cpo": CPOTrainer.cpo_loss(cpo, sums[0::2], sums[1::2])[0].mean() + likelihood,
        "orpo": likelihood
        - ORPOTrainer.odds_ratio_loss(trainer_of(beta=0.1), averages[0::2], averages[1::2])[0].mean(),
    }
    for name, value in expected.items():
        config = {} if name == "orpo" else {"label_smoothing": 0.1}
        gradient = torch.autograd.grad(value, logprobs, retain_graph=True)[0]
        found = ours(ALGORITHMS[name](actor=StandInWorker(), **config).loss, matrices)
        assert_same(found, value.detach(), gradient)  # TRL's ORPO is in fp32
