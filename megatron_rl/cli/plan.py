"""``megatron-rl plan``: a weight sync, a gradient all-reduce or steps with a lag, worked out on one CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_rl.cli.convert import Dtype
from megatron_rl.cli.errors import clear_errors

if TYPE_CHECKING:
    from megatron_rl.models import Architecture
    from megatron_rl.reshard import LinkSpeeds

LAG_OPTIONS = {"lag", "timing", "buffer"}

EPILOG = """
**Examples**

512 nodes of 8, engines of 16 ranks on the training ranks themselves:
`megatron-rl plan my-model --train tp=8,pp=8,ep=8 --rollout tp=16 --nodes 512`

Engines on 64 nodes of their own, as JSON: `megatron-rl plan my-model --train tp=8,pp=8 --rollout tp=8 --nodes 512
--rollout-nodes 64 --json`

Gradient all-reduce, library against hierarchical paths, on the cluster that a file describes (docs/all_reduce.md):
`megatron-rl plan --all-reduce cluster.yaml`

Steps with rollout ranks that sample while others train, against both in turns (docs/rollouts_in_flight.md):
`megatron-rl plan --lag 1 --timing training_s=20,push_s=1,token_s=0.02,tokens_mean=400,tokens_sigma=0.8,slots=64`

Bytes are exact: a run sends the same. Each is printed with the minimum of any plan. Seconds are an estimate from link
speeds alone.
"""


def plan(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(help="Hugging Face folder or config.json; weights are not read.")
    ] = None,
    train: Annotated[
        str, typer.Option(help="Training layout: tp, pp, vpp, cp, ep, etp; the rest is data parallel.")
    ] = "",
    rollout: Annotated[str, typer.Option(help="Layout of one rollout engine: tp, ep.")] = "tp=1",
    nodes: Annotated[int, typer.Option(min=1, help="Training nodes.")] = 1,
    rollout_nodes: Annotated[
        int, typer.Option(min=0, help="Nodes of engines only; 0 puts the engines on the training ranks.")
    ] = 0,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks (GPUs) of a node.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Of the rollout weights.")] = Dtype.BFLOAT16,
    max_staging_mib: Annotated[float, typer.Option(min=1, help="Cap on extra memory of a rank, in MiB.")] = 64,
    intra_node: Annotated[float, typer.Option(help="GB/s of a rank inside its node, each direction.")] = 400,
    inter_node: Annotated[float, typer.Option(help="GB/s of a rank to other nodes, each direction.")] = 50,
    all_reduce: Annotated[
        Path | None, typer.Option(help="YAML file of a cluster: plan a gradient all-reduce instead; no MODEL.")
    ] = None,
    lag: Annotated[
        int | None, typer.Option(min=0, help="Plan steps with samples up to this many versions old instead; no MODEL.")
    ] = None,
    timing: Annotated[
        str, typer.Option(help="For --lag: name=value,... or a YAML file; `plan --lag 0 --timing ?` lists the names.")
    ] = "",
    buffer: Annotated[
        int | None, typer.Option(min=1, help="For --lag: groups in the windowed law's buffer; none: of lag + 1 steps.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Dry run of a weight sync: bytes and their minimum, link loads, memory, estimated time."""
    with clear_errors():
        given = _given(context)
        if all_reduce is not None:
            _plan_all_reduce(all_reduce, sorted(given - {"all_reduce", "as_json"}), as_json)
            return
        if given & LAG_OPTIONS:
            _plan_lag(lag, timing, buffer, sorted(given - LAG_OPTIONS - {"as_json"}), as_json)
            return
        import torch

        from megatron_rl.config import ConfigError
        from megatron_rl.parallel import ParallelSizes
        from megatron_rl.run.forecast import Cluster, RolloutSizes, forecast

        if model is None or not train:
            raise ConfigError("give MODEL and --train tp=..,pp=.. for a weight sync, or --all-reduce FILE, or --lag L")
        found = forecast(
            _architecture(model),
            ParallelSizes.parse(_sizes(train, "--train"), "--train"),
            RolloutSizes.parse(_sizes(rollout, "--rollout"), "--rollout"),
            Cluster(nodes, rollout_nodes, ranks_per_node),
            getattr(torch, dtype.value),
            int(max_staging_mib * 2**20),
            _speeds(intra_node, inter_node),
        )
        typer.echo(json.dumps(found.to_json()) if as_json else str(found))


def _given(context: typer.Context) -> set[str]:
    """The options that the user gave."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _speeds(intra_node: float, inter_node: float) -> LinkSpeeds:
    from megatron_rl.config import ConfigError
    from megatron_rl.reshard import LinkSpeeds

    if min(intra_node, inter_node) <= 0:
        raise ConfigError(f"--intra-node {intra_node:g} --inter-node {inter_node:g}: expected more than 0 GB/s")
    return LinkSpeeds(intra_node * 1e9, inter_node * 1e9)


def _architecture(model: Path) -> Architecture:
    from megatron_rl.models.hf_config import best_architecture, read_hf_config

    return best_architecture(read_hf_config(model.parent if model.name == "config.json" else model))


def _plan_all_reduce(cluster: Path, others: list[str], as_json: bool) -> None:
    from megatron_rl.collectives.simulator import ClusterConfig, simulate
    from megatron_rl.config import ConfigError, load_config

    if others:
        raise ConfigError(
            "--all-reduce FILE takes neither MODEL nor --train nor any option but --json, since the file describes the "
            f"whole cluster: leave out {', '.join(others)}"
        )
    found = simulate(load_config(ClusterConfig, cluster))
    typer.echo(json.dumps(found.to_json()) if as_json else str(found))


def _plan_lag(lag: int | None, timing: str, buffer: int | None, others: list[str], as_json: bool) -> None:
    from megatron_rl.config import ConfigError, load_config
    from megatron_rl.run.lag_forecast import Timing, forecast_lag

    if others:
        raise ConfigError(f"--lag takes --timing, --buffer and --json alone: leave out {', '.join(others)}")
    if lag is None:
        raise ConfigError("--timing and --buffer belong to --lag L: give the number of versions")
    if timing == "?":
        for name, field in Timing.model_fields.items():
            typer.echo(f"{name:20}  {field.default!s:6}  {field.description}")
        return
    is_file = timing.endswith((".yaml", ".yml"))
    config = load_config(Timing, timing) if is_file else Timing.parse(_values(timing), "--timing")
    if buffer is not None and buffer < config.prompts_per_step:
        raise ConfigError(
            f"--buffer {buffer} never holds the {config.prompts_per_step} groups of a step (timing prompts_per_step)"
        )
    found = forecast_lag(config, lag, buffer)
    typer.echo(json.dumps(found.to_json()) if as_json else str(found))


def _values(text: str) -> dict[str, str]:
    from megatron_rl.config import ConfigError

    values = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--timing: {part!r} is not name=value; expected for example training_s=20,token_s=0.02")
        values[name.strip()] = value.strip()
    return values


def _sizes(text: str, option: str) -> dict[str, int]:
    from megatron_rl.config import ConfigError

    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if not value.strip().isdigit():
            raise ConfigError(f"{option} {text}: {part!r} is not name=number; expected for example tp=8,pp=2")
        sizes[name.strip()] = int(value)
    return sizes
