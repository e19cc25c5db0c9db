"""The contract of `TrainingEngine`, held by Megatron-Core's, by FSDP2's and by a plain torch one, and the same steps
through all.

A model of all engines begins with the same random weights. Oracle of log-probabilities and gradients: `transformers`
in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines.torch_engine import TorchEngine
from models.oracle import LLAMA
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_rl.algorithms import DPO, GRPO
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.engines.base import MicroBatching, TrainingEngine
from megatron_rl.engines.build import build_engine
from megatron_rl.engines.engine_config import EngineConfig, OptimizerConfig
from megatron_rl.engines.micro_batches import plan_micro_batches
from megatron_rl.models import hf_layout
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.reshard import LocalTransport, Resharder
from megatron_rl.trainer.checkpoint import DistributedCheckpoints
from megatron_rl.weights.fill import empty_tensors
from megatron_rl.workers import Actor, Critic, Reference, RewardModel
from megatron_rl.workers.loss import LossInputs, LossOutput
from megatron_rl.workers.outputs import logprob_output

SMALL = replace(LLAMA, num_layers=2, hidden=32, ffn=48, num_kv_heads=4, head_dim=4)
ADAM = OptimizerConfig(learning_rate=1e-3, clip_gradient=0.5)
ENGINES = ("megatron", "torch", "fsdp2")


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    yield ParallelContext.create(ParallelSizes(), seed=1)
    ParallelContext.forget()


class Tokenizer(SimpleNamespace):
    """As little of a tokenizer as an actor needs."""

    pad_token_id, eos_token_id, bos_token_id, pad_token, eos_token = 0, 2, 1, "p", "e"

    def __len__(self) -> int:
        return SMALL.vocab

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def random_model(seed: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config_from(SMALL, dtype="float32"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def engine_of(kind: str, context: ParallelContext, rows: int | None = None) -> TrainingEngine:
    if kind == "torch":
        return TorchEngine(random_model(), context, ADAM, rows)
    packing = None if rows is None else False
    config = EngineConfig(optimizer=ADAM, micro_batch_size=rows, packing=packing, backend=kind)
    return build_engine(random_model(), context, config, name="model")


@pytest.fixture(params=ENGINES)
def kind(request) -> str:
    return request.param


def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, SMALL.vocab, (length,), generator=generator).tolist() for length in (5, 9, 2, 12)]
    return Batch.from_sequences(rows, [[0] + [1] * (len(row) - 1) for row in rows])


def exact_logprobs(model: PreTrainedModel, given: Batch) -> Tensor:
    """``[num_tokens]``: log-probability of each token; 0 at each sequence's first."""
    found = []
    for row in given["input_ids"].split(given.lengths.tolist()):
        logprobs = model(row[None]).logits[0, :-1].log_softmax(-1)
        found += [logprobs.new_zeros(1), logprobs.gather(-1, row[1:, None])[:, 0]]
    return torch.cat(found)


def negative_sum(engine: TrainingEngine, given: Batch):
    """Minus the sum of all log-probabilities as an output function, its value as the result."""
    predicted = logprob_output(engine, given, temperature=1.0)

    def output(micro_batch, hidden):
        loss = -predicted(micro_batch, hidden).sum()
        return loss, float(loss)

    return output


def hf_weights(engine: TrainingEngine) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, through the layout that the engine gives."""
    target = hf_layout(engine.architecture)
    tensors = empty_tensors(target, 0, torch.float32)
    engine.sync_parameters()
    Resharder(engine.layout, target, 0, LocalTransport(), torch.float32).run(engine.published(), tensors)
    return tensors


# --- the contract ----------------------------------------------------------------------------------------------------


def test_the_layout_says_where_each_weight_is(kind, context):
    given = dict(random_model().named_parameters())
    found = hf_weights(engine_of(kind, context))
    assert found.keys() == given.keys()
    for name, weight in found.items():
        assert torch.equal(weight, given[name]), name


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_forward_gives_the_results_of_all_micro_batches_without_gradients(kind, context, rows):
    engine, given = engine_of(kind, context, rows), batch()
    micro_batches = plan_micro_batches(given, engine)
    predicted = logprob_output(engine, given, temperature=1.0)
    results = engine.forward(given, micro_batches, predicted)
    out = torch.zeros(given.num_tokens)
    for micro_batch, values in zip(micro_batches, results, strict=True):
        assert not values.requires_grad
        micro_batch.scatter(values, out)
    exact = exact_logprobs(random_model().double().eval(), given)
    assert torch.allclose(out.double(), exact.detach(), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_the_gradient_is_that_of_the_sum_and_begins_at_zero(kind, context, rows):
    engine, given = engine_of(kind, context, rows), batch()
    model = random_model().double()
    exact = -exact_logprobs(model, given).sum()
    exact.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    for _ in range(2):  # a second pass does not add to the first
        results = engine.forward_backward(given, plan_micro_batches(given, engine), negative_sum(engine, given))
        assert sum(results) == pytest.approx(float(exact.detach()), rel=1e-6)
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    assert engine.largest_gradient() == pytest.approx(largest, rel=1e-5)
    assert engine.step() == pytest.approx(float(norm), rel=1e-5)


def test_a_step_moves_the_weights_by_the_optimizer_s_rule(kind, context):
    engine, given = engine_of(kind, context), batch()
    model = random_model().double()
    (-exact_logprobs(model, given).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_gradient)
    torch.optim.AdamW(model.parameters(), ADAM.learning_rate, (ADAM.beta1, ADAM.beta2), weight_decay=0.0).step()
    engine.forward_backward(given, plan_micro_batches(given, engine), negative_sum(engine, given))
    assert engine.num_steps == 0
    assert engine.learning_rate == ADAM.learning_rate
    engine.step()
    assert engine.num_steps == 1
    for name, weight in model.named_parameters():
        moved = hf_weights(engine)[name].double()
        # Adam divides by the gradient's size: where that is all rounding, so is the step.
        assert (moved - weight).abs().quantile(0.99) < 1e-6, name


def test_a_gradient_that_is_not_finite_is_told(kind, context):
    engine, given = engine_of(kind, context), batch()
    predicted = logprob_output(engine, given, temperature=1.0)

    def output(micro_batch, hidden):
        difference = predicted(micro_batch, hidden)
        return (difference - difference.detach()).square().sum().sqrt(), None

    engine.forward_backward(given, plan_micro_batches(given, engine), output)
    assert not torch.tensor(engine.largest_gradient()).isfinite()


def test_tensors_are_views_that_see_later_steps(kind, context):
    engine, given = engine_of(kind, context), batch()
    before = engine.tensors()
    copies = {name: tensor.clone() for name, tensor in before.items()}
    engine.forward_backward(given, plan_micro_batches(given, engine), negative_sum(engine, given))
    engine.step()
    engine.sync_parameters()
    assert before.keys() == engine.parameters().keys() == {shard.name for shard in engine.layout.shards(0)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.tensors().items())
    assert any(not torch.equal(tensor, copies[name]) for name, tensor in before.items())


class Trainer:
    step = 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def test_a_resumed_role_takes_the_same_steps(kind, context, tmp_path):
    def actor() -> Actor:
        return Actor(engine_of(kind, context), Tokenizer())

    def step(worker: Actor) -> dict[str, float]:
        return worker.optimize(batch(), imitation)

    first = actor()
    step(first)
    DistributedCheckpoints(tmp_path, context, {"actor": first}, {}).save(Trainer())
    second = actor()
    assert DistributedCheckpoints(tmp_path, context, {"actor": second}, {}).restore(Trainer())
    assert (second.engine.num_steps, second.num_updates) == (1, 1)
    assert step(first) == step(second)
    for name, weight in first.engine.tensors().items():
        assert torch.equal(weight, second.engine.tensors()[name]), name


def test_another_engine_s_checkpoint_is_refused(context, tmp_path):
    place = tmp_path / "run"
    kept = Actor(engine_of("megatron", context), Tokenizer())
    DistributedCheckpoints(place, context, {"actor": kept}, {}).save(Trainer())
    other = Actor(engine_of("fsdp2", context), Tokenizer())
    with pytest.raises(ConfigError, match="in a megatron engine, but this run's is fsdp2: resume with backend=meg"):
        DistributedCheckpoints(place, context, {"actor": other}, {}).restore(Trainer())


# --- roles over either engine ----------------------------------------------------------------------------------------


def imitation(inputs: LossInputs) -> LossOutput:
    value = -inputs.masked(inputs.logprobs).sum() / inputs.totals.tokens
    return LossOutput(value, {"loss/imitation": inputs.token_metric(-inputs.logprobs)})


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for group in range(3):
        prompt = Prompt(torch.randint(3, SMALL.vocab, (3 + group,), generator=generator).tolist(), index=group)
        for _ in range(3):
            length = int(torch.randint(1, 8, (1,), generator=generator))
            ids = torch.randint(3, SMALL.vocab, (length,), generator=generator).tolist()
            made.append(
                Sample(prompt, ids, [-3.0] * length, group=group, reward=float(torch.rand((), generator=generator)))
            )
    return made


def grpo_step(actor: Actor) -> dict[str, float]:
    rows = samples()
    given = Batch(samples=rows, temperature=0.8)
    given.sequences["rewards"] = torch.tensor([sample.reward for sample in rows])
    algorithm = GRPO(
        actor,
        Reference(actor),
        kl_coefficient=0.05,
        entropy_coefficient=0.01,
        num_mini_batches=2,
        old_logprobs="recompute",
    )
    return algorithm.update()(given).metrics


def dpo_step(actor: Actor) -> dict[str, float]:
    pairs = Batch.from_sequences(
        [[1, 5, 6, 7], [1, 5, 8], [1, 9, 10], [1, 9, 11, 4], [1, 3, 4], [1, 3, 5]],
        [[0, 0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1, 1], [0, 0, 1], [0, 0, 1]],
    )
    return DPO(actor, Reference(actor), beta=0.3).update()(pairs).metrics


@pytest.mark.parametrize("step", [grpo_step, dpo_step])
def test_steps_of_both_engines_are_equal(context, step, tmp_path):
    found, saved = {}, {}
    for kind in ENGINES:
        actor = Actor(engine_of(kind, context), Tokenizer())
        found[kind] = [step(actor), step(actor)]
        saved[kind] = load_file(actor.save_pretrained(tmp_path / kind) / "model.safetensors")
    begin = dict(random_model().named_parameters())
    for kind in ("torch", "fsdp2"):
        for ours, theirs in zip(found[kind], found["megatron"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ("loss/total", "optimizer/gradient_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
        assert found[kind][0]["optimizer/gradient_norm"] > 1e-3
        assert saved[kind].keys() == saved["megatron"].keys()
        for name, weight in saved[kind].items():
            assert (weight - saved["megatron"][name]).abs().max() < 1e-5, name
            assert not torch.equal(weight, begin[name]), name


@pytest.mark.parametrize("kind", ["torch", "fsdp2"])
def test_the_whole_flow_runs_over_another_engine(kind, context):
    actor = Actor(engine_of(kind, context), Tokenizer())
    grpo = GRPO(actor=actor, reference=Reference(actor), kl_coefficient=0.01)
    flow = actor.sample(n=4, max_tokens=6) >> RewardModel(lambda sample: len(set(sample.response_ids)) / 6).score()
    flow = flow >> grpo.update()
    for version in (0, 1):
        done = flow(Batch(prompts=[Prompt([1, 5, 6], index=0), Prompt([1, 7], index=1)]))
        assert {sample.policy_version for sample in done.samples} == {version}
        assert done.metrics["optimizer/steps"] == 1
    assert not actor.verify_weights().faults
    actor.close()


def test_a_ready_engine_is_refused_where_it_does_not_fit(context):
    with pytest.raises(ConfigError, match="critic needs a model whose output layer is a value head, but the engine's"):
        Critic(engine_of("torch", context))
    with pytest.raises(ConfigError, match="a training engine, which has its own: leave it out"):
        Actor(engine_of("torch", context), Tokenizer(), optimizer=object())


def test_micro_batches_of_an_engine_that_cannot_pack_are_padded_rows(context):
    engine = engine_of("torch", context, rows=3)
    assert [m.rows for m in plan_micro_batches(batch(), engine)] == [3, 3]
    assert len(plan_micro_batches(batch(), engine, how=MicroBatching(packing=False, rows=1))) == 4
