"""Run on 4 ranks: models built on many layouts against the same model on one rank, in fp32.

The reference is computed by every rank for itself, sequence by sequence. Each case then runs the whole path under
Megatron's own schedule and DDP (hidden states, `token_logprobs`, a weighted sum of log-probabilities and entropies),
and compares every log-probability, entropy and gradient. Prints one line a case: name, and the largest errors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from engines.megatron.model.full_weights import full_name, shard_of

from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.core_attention import packed_params
from megatron_rl.engines.megatron.model.hidden_states import hidden_states
from megatron_rl.engines.megatron.model.model_chunk import layer_indices, output_weight, supports_packing
from megatron_rl.models import Architecture
from megatron_rl.models.architecture import MLA, Experts
from megatron_rl.models.pipeline import stage_layers
from megatron_rl.ops.token_logprobs import token_logprobs
from megatron_rl.parallel import ParallelContext, ParallelSizes

from megatron.core import parallel_state as ps  # isort: skip  (after megatron_rl, which gives it its CPU face)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

DENSE = Architecture("qwen3", 5, 32, 64, 4, 2, 8, 90, tied=True, qk_norm=True, rope_theta=1000.0)
BIASED = replace(DENSE, family="qwen2", tied=False, qk_norm=False, qkv_bias=True)
SPARSE = replace(DENSE, family="qwen3_moe", num_layers=2, tied=False, experts=Experts(4, 2, 24, dense_layers=(0,)))
ROUTED = Experts(4, 2, 24, shared_ffn=24, dense_layers=(0,), scoring="sigmoid", correction_bias=True)
LATENT = replace(
    DENSE,
    family="deepseek_v3",
    num_layers=2,
    tied=False,
    qk_norm=False,
    num_kv_heads=4,
    head_dim=12,
    experts=ROUTED,
    mla=MLA(q_rank=16, kv_rank=20, nope_dim=4, rope_dim=8, value_dim=6),
)
WINDOWED = replace(BIASED, family="mistral", qkv_bias=False, num_layers=2, window=5)
ARCHITECTURES = {"dense": DENSE, "biased": BIASED, "sparse": SPARSE, "windowed": WINDOWED, "latent": LATENT}
LENGTHS = (12, 28, 32, 8, 24, 16, 4, 36)  # neighbours pack to 40
COLUMNS, ROWS, TEMPERATURE, VOCAB_MULTIPLE = 40, 2, 0.7, 32


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    sizes: ParallelSizes
    packed: bool = True
    value_head: bool = False
    recompute: bool = False


@dataclass
class Reference:
    """The model on one rank: parameters, and per architecture what every layout must give."""

    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    outputs: list[torch.Tensor]  # of each sequence: [length, 2] log-probabilities and entropies, or [length, 1] values


@dataclass
class Micro:
    """Local positions of some sequences: which sequence and position each is; -1 = padding."""

    members: list[int]
    sequence: torch.Tensor
    position: torch.Tensor
    packed: bool
    cp: int
    shape: tuple[int, int] = field(default=(1, COLUMNS))


def data() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 90, (n,), generator=generator) for n in LENGTHS]
    targets = [torch.randint(0, 90, (n,), generator=generator) for n in LENGTHS]
    factors = [torch.randn(n, 2, generator=generator) for n in LENGTHS]
    return tokens, targets, factors


def initialise(sizes: ParallelSizes) -> None:
    ParallelContext.forget()
    ps.initialize_model_parallel(
        sizes.tp,
        sizes.pp,
        sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
    )
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    torch.manual_seed(11)


def build(case: Case, sizes: ParallelSizes) -> list[torch.nn.Module]:
    architecture = ARCHITECTURES[case.architecture]
    config = transformer_config(architecture, sizes, recompute=case.recompute)
    return build_model(architecture, config, value_head=case.value_head, vocab_multiple=VOCAB_MULTIPLE)


def score(chunk, case: Case, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n, 2] log-probabilities and entropies, or [n, 1] values."""
    flat = output.reshape(-1, output.shape[-1])
    if case.value_head:
        return flat
    weight = output_weight(chunk)
    group = ps.get_tensor_model_parallel_group()
    logprobs, entropy = token_logprobs(
        flat,
        weight,
        targets,
        vocab_start=group.rank() * weight.shape[0],
        vocab_size=ARCHITECTURES[case.architecture].vocab,
        temperature=TEMPERATURE,
        group=group if group.size() > 1 else None,
        with_entropy=True,
        chunk_tokens=16,
    )
    return torch.stack([logprobs, entropy], dim=-1)


def reference(case: Case) -> Reference:
    """By plain autograd and, for log-probabilities, through the model's own logits."""
    initialise(ParallelSizes())
    (model,) = build(case, ParallelSizes())
    with torch.no_grad():
        for parameter in model.parameters():  # biases and value heads start at zero, norms at one
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    outputs = []
    for tokens, targets, factors in zip(*data(), strict=True):
        logits = model(tokens[None], torch.arange(len(tokens))[None], None)[0].float()
        if case.value_head:
            out = logits
        else:
            logs = torch.log_softmax(logits[:, :90] / TEMPERATURE, dim=-1)
            out = torch.stack([logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)], dim=-1)
        (out * factors[:, : out.shape[1]]).sum().backward()
        outputs.append(out.detach())
    named = dict(model.named_parameters())
    return Reference(
        {full_name(model, name): p.detach().clone() for name, p in named.items()},
        {full_name(model, name): p.grad.clone() for name, p in named.items()},
        outputs,
    )


def micro_batches(case: Case) -> list[Micro]:
    """This rank's micro-batches: two sequences each, split over context-parallel ranks as Megatron does."""
    dp, rank = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    share = len(LENGTHS) // dp
    members = list(range(rank * share, (rank + 1) * share))
    return [make_micro(case, members[i : i + ROWS]) for i in range(0, share, ROWS)]


def make_micro(case: Case, members: list[int]) -> Micro:
    cp, cp_rank = ps.get_context_parallel_world_size(), ps.get_context_parallel_rank()
    widths = [LENGTHS[m] if case.packed else COLUMNS for m in members]
    sequence, position = [], []
    for member, width in zip(members, widths, strict=True):
        chunks = torch.arange(width).chunk(2 * cp) if cp > 1 else [torch.arange(width)]
        mine = torch.cat([chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]]) if cp > 1 else chunks[0]
        position.append(torch.where(mine < LENGTHS[member], mine, -1))
        sequence.append(torch.full_like(mine, member))
    shape = (1, COLUMNS // cp) if case.packed else (len(members), COLUMNS // cp)
    return Micro(members, torch.cat(sequence), torch.cat(position), case.packed, cp, shape)


def pick(values: list[torch.Tensor], micro: Micro) -> torch.Tensor:
    rows = [
        values[s][p] if p >= 0 else torch.zeros_like(values[0][0])
        for s, p in zip(micro.sequence, micro.position, strict=True)
    ]
    return torch.stack(rows)


def run(case: Case, truth: Reference) -> tuple[float, float]:
    """Largest relative errors of outputs and of gradients on this rank."""
    initialise(case.sizes)
    chunks = build(case, case.sizes)
    check_placement(case, chunks)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(shard_of(truth.weights, chunk, name, parameter))
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    models = [DistributedDataParallel(chunks[0].config, settings, chunk) for chunk in chunks]
    tokens, targets, factors = data()
    errors = [0.0]

    def loss(micro: Micro, chunk, output):
        got = score(chunk, case, output, pick(targets, micro))
        real = (micro.position >= 0)[:, None]
        want = pick(truth.outputs, micro)
        scale = max(out.abs().max() for out in truth.outputs)
        errors.append(((got.detach() - want) * real).abs().max().item() / scale.item())
        total = (got * pick(factors, micro)[:, : got.shape[1]] * real).sum()
        return total, torch.ones((), dtype=torch.int), {}

    def forward_step(iterator, chunk):
        micro = next(iterator)
        ids = pick(tokens, micro).view(micro.shape)
        packed = None
        if micro.packed:
            lengths = torch.tensor([0] + [LENGTHS[m] for m in micro.members])
            packed = packed_params(lengths.cumsum(0).int())
        with hidden_states(chunk):
            output = chunk(ids, micro.position.clamp_min(0).view(micro.shape), None, packed_seq_params=packed)
        return output, partial(loss, micro, chunk)

    micros = micro_batches(case)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micros) for _ in models] if len(models) > 1 else iter(micros),
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(micros),
        seq_length=COLUMNS,
        micro_batch_size=1 if case.packed else ROWS,
        forward_only=False,
    )
    finalize_model_grads(models)
    return largest(errors), gradient_error(chunks, truth)


def largest(errors: list[float]) -> float:
    """NaN counts as infinite: neither `max` nor a reduction would keep it."""
    return float(torch.tensor(errors).nan_to_num(nan=torch.inf).max())


def gradient_error(chunks, truth: Reference) -> float:
    errors = [0.0]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            want = shard_of(truth.gradients, chunk, name, parameter)
            scale = truth.gradients[full_name(chunk, name, truth.gradients)].abs().max()
            errors.append(((parameter.main_grad - want).abs().max() / scale).item())
    return largest(errors)


def check_placement(case: Case, chunks) -> None:
    sizes, layers = case.sizes, ARCHITECTURES[case.architecture].num_layers
    for stage, chunk in enumerate(chunks):
        expected = stage_layers(layers, sizes.pp, sizes.vpp, ps.get_pipeline_model_parallel_rank(), stage)
        assert layer_indices(chunk) == tuple(expected), (layer_indices(chunk), expected)
        assert supports_packing(chunk)


def cases() -> list[Case]:
    def s(**kwargs) -> ParallelSizes:
        return ParallelSizes(**kwargs)

    sp = {"sequence_parallel": True}
    return [
        Case("dp4", "dense", s()),
        Case("tp2", "dense", s(tp=2)),
        Case("tp2 padded", "dense", s(tp=2), packed=False),
        Case("tp2 sp", "dense", s(tp=2, **sp)),
        Case("pp2", "dense", s(pp=2)),
        Case("pp2 padded recompute", "dense", s(pp=2), packed=False, recompute=True),
        Case("tp2 pp2", "dense", s(tp=2, pp=2)),
        Case("tp2 pp2 sp", "dense", s(tp=2, pp=2, **sp)),
        Case("cp2", "dense", s(cp=2)),
        Case("cp2 padded", "dense", s(cp=2), packed=False),
        Case("tp2 cp2 sp", "dense", s(tp=2, cp=2, **sp)),
        Case("pp2 cp2", "dense", s(pp=2, cp=2)),
        Case("pp2 vpp2", "dense", s(pp=2, vpp=2)),
        Case("biased tp2 pp2", "biased", s(tp=2, pp=2)),
        Case("biased pp4", "biased", s(pp=4), packed=False),
        Case("biased cp2 tp2", "biased", s(cp=2, tp=2), packed=False),
        Case("value tp2 pp2 sp", "dense", s(tp=2, pp=2, **sp), value_head=True),
        Case("value tp2 cp2", "dense", s(tp=2, cp=2), value_head=True),
        Case("windowed cp2 tp2", "windowed", s(cp=2, tp=2)),
        Case("windowed pp2 padded", "windowed", s(pp=2), packed=False),
        Case("ep2", "sparse", s(ep=2)),
        Case("ep4 padded", "sparse", s(ep=4), packed=False),
        Case("tp2 ep2 sp", "sparse", s(tp=2, ep=2, **sp)),
        Case("pp2 ep2", "sparse", s(pp=2, ep=2)),
        Case("latent tp2 ep2 sp", "latent", s(tp=2, ep=2, **sp)),
        Case("latent tp2 cp2 ep2 sp", "latent", s(tp=2, cp=2, ep=2, **sp)),
        Case("latent pp2 padded recompute", "latent", s(pp=2), packed=False, recompute=True),
    ]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    known: dict[tuple[str, bool], Reference] = {}
    for case in cases():
        if sys.argv[1:] and case.name not in sys.argv[1:]:
            continue
        key = (case.architecture, case.value_head)
        if key not in known:
            known[key] = reference(replace(case, recompute=False))
        errors = torch.tensor(run(case, known[key]))
        dist.all_reduce(errors, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(f"case|{case.name}|{errors[0]:.3e}|{errors[1]:.3e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
