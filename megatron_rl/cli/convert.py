"""``megatron-rl convert``: Hugging Face folders and Megatron checkpoints into one another."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_rl.cli.errors import clear_errors, environment_rank
from megatron_rl.log import configure_logging

if TYPE_CHECKING:
    from megatron_rl.parallel import ParallelSizes

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

Nothing written, but proved for a layout of training and one of SGLang, from the headers of the files:
`megatron-rl convert my-model --prove --tp 8 --pp 16 --ep 64 --rollout-tp 32`

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
    target: Annotated[
        Path | None,
        typer.Argument(help="Folder to write, complete or not at all; --prove alone needs none."),
    ] = None,
    to: Annotated[Target | None, typer.Option(help="Format of the result.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that a checkpoint's files are cut for.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages, likewise.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Model chunks per pipeline stage, likewise.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks, likewise.")] = 1,
    etp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks inside each expert, likewise.")] = 1,
    config: Annotated[
        Path | None, typer.Option(help="config.json (or its folder) for a Megatron checkpoint without one.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the result; by default the source's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare a checkpoint's files with their digests.")
    ] = True,
    drop_mtp: Annotated[
        bool, typer.Option("--drop-mtp", help="Leave out layers that predict several tokens, else refused by name.")
    ] = False,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove",
            help="First prove from config.json and the headers of the files that every row comes back from Megatron's "
            "layout and arrives in SGLang's, or name those that do not and write nothing.",
        ),
    ] = False,
    rollout_tp: Annotated[int, typer.Option(min=1, help="With --prove: SGLang's tensor-parallel ranks.")] = 1,
    rollout_ep: Annotated[int, typer.Option(min=1, help="With --prove: SGLang's expert-parallel ranks.")] = 1,
) -> None:
    """Convert weights, streaming: one process, which never holds more than some rows of a tensor.

    A Megatron checkpoint loads into any layout, whatever it was written for; in the one that it was cut for each rank
    reads one file.
    """
    rank = environment_rank()
    with clear_errors(rank):
        from megatron_rl.config import ConfigError, masked
        from megatron_rl.parallel import ParallelSizes

        configure_logging(rank, rewrite=masked)
        if config is not None and not config.exists():
            raise ConfigError(f"--config {config}: no such file or folder; expected a Hugging Face config.json")
        sizes = ParallelSizes(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp)
        if prove:
            _prove(source, sizes, rollout_tp, rollout_ep, rank, drop_mtp)
        if target is None and to is None and prove:
            return
        if target is None or to is None:
            missing = "a folder to write" if target is None else "--to hf or --to megatron"
            raise ConfigError(f"{missing} is not given: convert SRC DST --to hf|megatron, or convert SRC --prove")
        chosen: dict[str, Any] = {"config": config, "overwrite": overwrite, "verify": verify, "drop_mtp": drop_mtp}
        _write(source, target, to, sizes, rank, dtype=dtype, **chosen)


def _write(
    source: str, target: Path, to: Target, sizes: ParallelSizes, rank: int, *, dtype: Dtype | None, **given: Any
) -> None:
    """Convert, and say what was written."""
    import torch

    from megatron_rl.engines.conversion import convert as convert_weights

    number_type = getattr(torch, dtype.value) if dtype else None
    written = convert_weights(source, target, to.value, sizes, dtype=number_type, **given)
    if rank == 0:
        typer.echo(f"wrote {written}")
        if to is Target.MEGATRON:
            from megatron_rl.weights.megatron_checkpoint import load_options

            typer.echo(f"for Megatron-LM: {load_options(written)}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _prove(source: str, sizes: ParallelSizes, rollout_tp: int, rollout_ep: int, rank: int, drop_mtp: bool) -> None:
    """Print the proof, or what is in its way and end."""
    from megatron_rl.config import ConfigError
    from megatron_rl.weights.proof import prove_folder

    found = prove_folder(source, sizes, rollout_tp, rollout_ep, drop_mtp)
    if rank == 0:
        typer.echo(str(found))
    if found.faults:
        raise ConfigError(f"{source}: {len(found.faults)} faults, first {found.faults[0]}; nothing was written")
