"""``megatron-rl doctor``: proof that a configuration's update does not depend on the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli.errors import clear_errors

FAULT = 1  # exit code when something depends on the layout

EPILOG = """
**What it does**

The configured algorithm makes one update on a small random model of the configured kind and a fixed random batch: in
one process; in small micro-batches; in padded rows; and with two ranks along each of DP, CP, TP and PP. Everything that
the update computes is compared with one process in the order of computation: the fields that stages write
(log-probabilities, values, advantages, returns), the loss, the gradient of every weight, all metrics. The first that
differs is named. The configured model, data and rewards are not needed; gradient clipping and the configured optimizer
are not used (plain SGD, fp32).

The exit code is 0 when nothing differs, 1 when something does, 2 when the configuration or the update itself is broken.

**Examples**

`megatron-rl doctor examples/arithmetic_grpo/config.yaml`

Of a trainer in one call: `megatron-rl doctor examples/dpo_pairs/config.yaml dpo.loss=ipo`

An algorithm of your own under the same configuration:
`megatron-rl doctor CONFIG --algorithm my_algorithms.py:MyAlgorithm algorithm.num_mini_batches=2`

Also on four ranks (TP2 PP2, CP2 DP2): `megatron-rl doctor CONFIG --ranks 4`
"""


def doctor(
    config: Annotated[Path, typer.Argument(help="YAML file, as for `train` or as examples/dpo_pairs has it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file.")] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="my.module:MyAlgo, file.py:MyAlgo or a known name, instead of the file's.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, max=4, help="Processes of the largest layout: 2 or 4.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for all layouts of one number of ranks.")] = 300.0,
) -> None:
    """Prove that loss, gradients, advantages and metrics do not depend on DP, CP, TP, PP, micro-batches or packing.

    Starts torchrun by itself; takes about a minute on two cores.
    """
    with clear_errors():
        from megatron_rl.run.doctor.examine import examine
        from megatron_rl.run.doctor.one_call import load_examined

        run = load_examined(config, overrides or [])
        say = lambda line: typer.echo(line, err=True)  # noqa: E731
        report = examine(run, algorithm, max_ranks=ranks, timeout=timeout, progress=say)
    typer.echo(str(report))
    if not report.healthy:
        raise typer.Exit(FAULT)
