"""``megatron-rl train``: a YAML file and dotted overrides become a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli.errors import clear_errors, environment_rank, environment_world_size
from megatron_rl.log import configure_logging

EPILOG = """
**Examples**

One process: `megatron-rl train CONFIG`

Another model and a smaller step than the file says: `megatron-rl train CONFIG model=./my-model actor.sampling.n=4`

Four processes: `torchrun --nproc-per-node 4 -m megatron_rl train CONFIG parallel.tp=2 parallel.pp=2`

Two nodes of 8, the same command on each; restarted runs continue from the newest complete checkpoint:
`torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d
--rdzv-endpoint HOST:29500 -m megatron_rl train CONFIG` (more in docs/multi_node.md)

All mistakes in a configuration for 16 ranks, without a device:
`WORLD_SIZE=16 megatron-rl train CONFIG --check`

Every key is described in docs/configuration.md.
"""


def train(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check all that needs no device, print the configuration, and stop.")
    ] = False,
) -> None:
    """Train as a YAML file says."""
    rank = environment_rank()
    with clear_errors(rank):
        from megatron_rl.config import load_config, masked, masked_values
        from megatron_rl.run.run_config import RunConfig

        run = load_config(RunConfig, config, overrides or [])
        configure_logging(rank, run.log_level, masked)
        if check:
            from megatron_rl.run.check import check_run

            world_size = environment_world_size()
            if rank == 0:
                notes = check_run(run, world_size)
                typer.echo(json.dumps(masked_values(run.model_dump(mode="json")), indent=2))
                for note in notes:
                    typer.echo(f"note: {masked(note)}", err=True)
            return
        import torch.distributed as dist

        from megatron_rl.run.build import build_trainer

        build_trainer(run).train()
        dist.destroy_process_group()
