"""Megatron-LM itself, from the sources at $MEGATRON_LM_PATH: its argument parser, builder and checkpoint functions.

Its training package wants a GPU; these let it run here, in a test's process only: the CPU face reaches it as it
reaches megatron.core, its Triton kernels are left out, and nothing is compiled or asked of a GPU.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.devices.cpu_face import finder

PATH = Path(os.environ.get("MEGATRON_LM_PATH", "/nowhere"))
FACED = ("core", "training", "legacy")

sys.path.insert(0, str(PATH))
finder._is_ours = lambda name: tuple(name.split(".")[:2]) in {("megatron", part) for part in FACED}
sys.modules["megatron.core.transformer.custom_layers.batch_invariant_kernels"] = MagicMock()

from megatron.core import mpu, tensor_parallel  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.rerun_state_machine import destroy_rerun_state_machine  # noqa: E402
from megatron.training import arguments, checkpointing, get_args, global_vars, initialize  # noqa: E402
from megatron.training.training import get_model  # noqa: E402

initialize._compile_dependencies = lambda: None
arguments.get_device_arch_version = lambda: 10

HOST = (  # what a machine without a GPU asks for; says nothing of the model
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --use-cpu-initialization "
    "--distributed-backend gloo --tokenizer-type NullTokenizer --vocab-size 300 --micro-batch-size 1 "
    "--train-iters 10 --lr 1e-4 --save-interval 100 --exit-on-missing-checkpoint"
)
SEQUENCE = 16


def start(options: str) -> SimpleNamespace:
    """Megatron-LM initialised with a command line, anew: its arguments."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    global_vars.destroy_global_vars()
    global_vars.unset_global_variables()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    sys.argv = ["pretrain_gpt.py", *HOST.split(), *options.split()]
    sizes = arguments.parse_args()
    mpu.initialize_model_parallel(
        sizes.tensor_model_parallel_size,
        sizes.pipeline_model_parallel_size,
        2 if sizes.num_virtual_stages_per_pipeline_rank else None,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=sizes.expert_tensor_parallel_size,
    )
    initialize.initialize_megatron(allow_no_cuda=True)
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    return get_args()


def build() -> list[torch.nn.Module]:
    """This rank's model chunks, as pretrain_gpt.py makes them; biases and norms are made to matter."""
    from gpt_builders import gpt_builder
    from model_provider import model_provider

    model = get_model(partial(model_provider, gpt_builder), wrap_with_ddp=False)
    return list(model)


def shake(model: list[torch.nn.Module]) -> None:
    """Move biases and norms away from zeros and ones, the same on all tensor-parallel ranks."""
    torch.manual_seed(5)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.rand(parameter.shape) * 0.2)


def logits(model: list[torch.nn.Module]) -> Tensor | None:
    """``[2, SEQUENCE, vocabulary]`` of two fixed rows, on the last pipeline stage; None before."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 300, (2, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE)[None]

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        return chunk(next(iterator), positions, None), lambda output, non_loss_data: output

    batches = [iter(rows[:, None]) for _ in model]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(model) > 1 else batches[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return None
    return torch.cat([tensor_parallel.gather_from_tensor_model_parallel_region(output) for output in outputs])


def save(model: list[torch.nn.Module], iteration: int = 3) -> None:
    checkpointing.save_checkpoint(iteration, model, None, None, 0)


def load(model: list[torch.nn.Module]) -> None:
    checkpointing.load_checkpoint(model, None, None)


def stop() -> None:
    """Take Megatron-LM's groups down, for `convert`."""
    dist.barrier()
    mpu.destroy_model_parallel()
