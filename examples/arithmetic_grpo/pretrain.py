"""A Megatron-Core pretraining job of the plain kind: a character-level model learns two-digit addition from text.

    torchrun --nproc-per-node 4 examples/arithmetic_grpo/pretrain.py

Nothing here knows of reinforcement learning; `train_rl.py` extends this job.
"""

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import megatron_rl  # noqa: F401  lets Megatron-Core run where there is no GPU; must come before megatron.core

# isort: split
import torch
import torch.nn.functional as F
from arithmetic import VOCABULARY, build_tokenizer, prompt, split_sums, text
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

warnings.filterwarnings("ignore", category=FutureWarning)  # Megatron-Core uses names that torch 2.13 replaces

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
SIDE = 2 if int(os.environ.get("WORLD_SIZE", "1")) >= 4 else 1  # TP2 x PP2 where there are processes for it
PAD = VOCABULARY.index("<pad>")
NUM_MICRO_BATCHES = 2
LENGTH = len("99+99=198") + 1  # tokens of the longest text, <eos> included


def initialize(tensor_parallel: int, pipeline_parallel: int, seed: int) -> None:
    if CUDA:
        torch.cuda.set_device(DEVICE)
    backend = "nccl" if CUDA else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend)
    else:  # one process without torchrun
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def build_model(query_groups: int = 2) -> list[DistributedDataParallel]:
    """This rank's part of a Llama-shaped model of about 300,000 parameters."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=query_groups,
        ffn_hidden_size=256,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.05,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,  # the same weights whatever the tensor parallelism
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    engine = CUDA and find_spec("transformer_engine") is not None
    spec = get_gpt_layer_with_transformer_engine_spec() if engine else get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=len(VOCABULARY),
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).to(DEVICE)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.no_sync_func = ddp.no_sync
    return [ddp]


def build_optimizer(model: list[DistributedDataParallel], learning_rate: float) -> MegatronOptimizer:
    config = OptimizerConfig(
        optimizer="adam",
        lr=learning_rate,
        min_lr=learning_rate / 10,
        weight_decay=0.01,
        adam_beta2=0.98,
        clip_grad=1.0,
    )
    optimizer = get_megatron_optimizer(config, model)
    model[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def save_checkpoint(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, step: int) -> None:
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    torch.distributed.barrier()
    weights = model[0].module.sharded_state_dict()
    state = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights), "step": step}
    dist_checkpointing.save(state, str(path))


def load_checkpoint(path: Path, model: list[DistributedDataParallel]) -> None:
    """Read the weights, in whatever layout they were written."""
    state = dist_checkpointing.load({"model": model[0].module.sharded_state_dict()}, str(path))
    model[0].module.load_state_dict(state["model"])


def encode(sums: list[tuple[int, int]]) -> torch.Tensor:
    """Token ids ``[sums, LENGTH]``, padded on the right."""
    rows = build_tokenizer()([text(a, b) for a, b in sums], padding="max_length", max_length=LENGTH)["input_ids"]
    return torch.tensor(rows, device=DEVICE)


def batches(rows: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless random micro-batches ``[size, LENGTH]``; every data-parallel rank draws its own."""
    generator = torch.Generator().manual_seed(seed + parallel_state.get_data_parallel_rank())
    while True:
        yield rows[torch.randint(len(rows), (size,), generator=generator)]


def forward_step(data: Iterator[torch.Tensor], model: DistributedDataParallel):
    rows = next(data)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = torch.arange(LENGTH - 1, device=DEVICE).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels)

    def loss_function(losses: torch.Tensor):
        real = labels != PAD
        loss = (losses * real).sum() / real.sum()
        return loss, {"loss": loss.detach().clone()}  # the schedule scales the first in place

    return output, loss_function


def train(model: list[DistributedDataParallel], optimizer: MegatronOptimizer, options: argparse.Namespace) -> int:
    """Train until enough training sums are answered, and return the number of steps."""
    peak, lowest = optimizer.config.lr, optimizer.config.min_lr
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, peak, lowest, options.steps // 20, options.steps, "cosine", 0.01, 0.01, 0, "constant"
    )
    rows = encode(split_sums()[0])
    data, watched = batches(rows, options.micro_batch, options.seed), rows[:: len(rows) // 500]
    tokens_a_step = NUM_MICRO_BATCHES * options.micro_batch * (LENGTH - 1)
    tokens_a_step *= parallel_state.get_data_parallel_world_size()
    started = time.time()
    for step in range(1, options.steps + 1):
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=LENGTH - 1,
            micro_batch_size=options.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
        if step % 10 == 0:
            accuracy = greedy_accuracy(model, watched)
            speed = step * tokens_a_step / (time.time() - started)
            report(losses, f"step {step:3d}  accuracy on training sums {accuracy:.3f}  {speed:,.0f} tokens/s")
            if accuracy >= options.stop_at:
                break
    return step


def report(losses: list[dict[str, torch.Tensor]], progress: str) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # losses are on the last stage
        loss = sum(entry["loss"].item() for entry in losses) / len(losses)
        print(f"{progress}  loss {loss:.4f}", flush=True)


@torch.no_grad()
def greedy_accuracy(model: list[DistributedDataParallel], rows: torch.Tensor) -> float:
    """Share of the sums in ``rows`` that greedy decoding answers exactly, <eos> included; the same on every rank.

    Greedy decoding gives the right answer exactly when every token of it is the most likely one after the right
    tokens before it, so one forward pass tells.
    """

    def predict(data: Iterator[torch.Tensor], chunk: DistributedDataParallel):
        tokens = next(data)[:, :-1].contiguous()
        logits = chunk(tokens, torch.arange(LENGTH - 1, device=DEVICE).expand_as(tokens), None)
        return logits, lambda logits, non_loss_data: gather_from_tensor_model_parallel_region(logits).argmax(-1)

    predicted = get_forward_backward_func()(
        forward_step_func=predict,
        data_iterator=iter([rows]),
        model=model,
        num_microbatches=1,
        seq_length=LENGTH - 1,
        micro_batch_size=len(rows),
        forward_only=True,
        collect_non_loss_data=True,
    )
    right = torch.zeros(1, device=DEVICE)
    if parallel_state.is_pipeline_last_stage():
        answers, labels = slice(len(prompt(10, 10)) - 1, None), rows[:, 1:]
        matches = (predicted[0] == labels) | (labels == PAD)
        right += matches[:, answers].all(1).sum()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(right, source, parallel_state.get_pipeline_model_parallel_group())
    return right.item() / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, default=SIDE)
    parser.add_argument("--pipeline-parallel", type=int, default=SIDE)
    parser.add_argument("--query-groups", type=int, default=2)
    parser.add_argument("--steps", type=int, default=350, help="at most this many")
    parser.add_argument("--stop-at", type=float, default=0.4, help="accuracy that leaves something to learn")
    parser.add_argument("--micro-batch", type=int, default=64, help=f"sums; a step has {NUM_MICRO_BATCHES} of them")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/arithmetic_grpo/pretrained"))
    options = parser.parse_args()

    initialize(options.tensor_parallel, options.pipeline_parallel, options.seed)
    model = build_model(options.query_groups)
    optimizer = build_optimizer(model, options.learning_rate)
    step = train(model, optimizer, options)
    accuracy = greedy_accuracy(model, encode(split_sums()[1]))
    save_checkpoint(options.output, model, optimizer, step)
    if torch.distributed.get_rank() == 0:
        print(f"held-out greedy accuracy {accuracy:.3f} after {step} steps; saved to {options.output}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
