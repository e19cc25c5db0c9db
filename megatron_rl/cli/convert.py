"""``megatron-rl convert``: Hugging Face folders and Megatron checkpoints into one another."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli.errors import clear_errors, environment_rank
from megatron_rl.log import configure_logging

EPILOG = """
**Examples**

A checkpoint of a training run as a Hugging Face folder:
`megatron-rl convert outputs/run/checkpoints/step_000040 trained --to hf`

The newest checkpoint of a Megatron-LM job (`--ckpt-format torch_dist` or `torch`), which says what model it holds:
`megatron-rl convert megatron-lm-run trained --to hf`

A checkpoint of another program, which does not:
`megatron-rl convert pretrained trained --to hf --config folder-with-config.json`

A Hugging Face folder as a checkpoint that `pretrain_gpt.py --load ckpt` takes, with a file for each of four ranks:
`megatron-rl convert my-model ckpt --to megatron --tp 2 --pp 2`

And back: `megatron-rl convert ckpt my-model-again --to hf`

By several processes, each of which writes some of the files: `torchrun --nproc-per-node 8 -m megatron_rl convert
my-model ckpt --to megatron --tp 8 --pp 2`
"""


class Target(enum.StrEnum):
    """What can be written."""

    HF = "hf"
    MEGATRON = "megatron"


class Dtype(enum.StrEnum):
    """Number formats of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder or model id, or Megatron checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it appears complete or not at all.")],
    to: Annotated[Target, typer.Option(help="Format of the result.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that a checkpoint's files are cut for.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages, likewise.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks, likewise.")] = 1,
    etp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks inside each expert, likewise.")] = 1,
    config: Annotated[
        Path | None, typer.Option(help="config.json (or its folder) for a Megatron checkpoint without one.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the result; by default the source's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare a checkpoint's files with their digests first.")
    ] = True,
) -> None:
    """Convert weights, streaming: one process, which never holds more than some rows of a tensor.

    A Megatron checkpoint loads into any layout, whatever it was written for; in the one that it was cut for each rank
    reads one file.
    """
    rank = environment_rank()
    with clear_errors(rank):
        import torch

        from megatron_rl.config import ConfigError, masked
        from megatron_rl.engines.conversion import convert as convert_weights
        from megatron_rl.parallel import ParallelSizes

        configure_logging(rank, rewrite=masked)
        if config is not None and not config.exists():
            raise ConfigError(f"--config {config}: no such file or folder; expected a Hugging Face config.json")
        sizes = ParallelSizes(tp=tp, pp=pp, ep=ep, etp=etp)
        number_type = getattr(torch, dtype.value) if dtype else None
        written = convert_weights(
            source, target, to.value, sizes, config=config, dtype=number_type, overwrite=overwrite, verify=verify
        )
        if rank == 0:
            typer.echo(f"wrote {written}")
            if to is Target.MEGATRON:
                from megatron_rl.weights.megatron_checkpoint import load_options

                typer.echo(f"for Megatron-LM: {load_options(written)}")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
