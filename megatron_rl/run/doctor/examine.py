"""`examine`: the parent process of `megatron-rl doctor`; one torchrun for each world size, then one report."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.algorithms import OfflineAlgorithm
from megatron_rl.config import USER_CODE, ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import NoFamilyError
from megatron_rl.models.hf_config import architecture_from_hf, read_hf_config
from megatron_rl.run.build import find_algorithm
from megatron_rl.run.doctor.compare import STEPS, Difference, Measured, differences
from megatron_rl.run.doctor.measure import Plan
from megatron_rl.run.doctor.random_data import PLAIN, read_model, shrunk, write_random_model
from megatron_rl.run.doctor.variants import BASE, Variant, variants_for
from megatron_rl.run.run_config import RunConfig

HINTS = {
    "micro-batch": "something is divided by what one micro-batch holds: divide by inputs.totals, and give metrics as "
    "Mean(total, weight)",
    "packing": "something reads over the border of a sequence or from padding: use inputs.mask and inputs.sequence_ids",
    "dp": "something is computed from one rank's samples alone: reduce it over self.dp_group, as whiten and "
    "masked_moments do, or let the worker reduce it",
    "cp": "something reads neighbouring positions, or counts a whole sequence once on every context-parallel rank: "
    "sequences are split there; use inputs.sequence_sum and inputs.sequence_metric, and fields as they are aligned",
    "tp": "something differs between tensor-parallel ranks, such as an unseeded random number",
    "pp": "something depends on the pipeline stage that it runs on",
    "ep": "something depends on which experts a rank holds, such as an unseeded random number",
}


@dataclass(frozen=True)
class Report:
    """The differences found on each layout."""

    subject: str
    found: dict[Variant, list[Difference]]

    @property
    def healthy(self) -> bool:
        return not any(self.found.values())

    def __str__(self) -> str:
        width = max(len(variant.name) for variant in self.found)
        lines = [self.subject, "", f"{'layout':{width}}  ranks  " + "  ".join(f"{step:8}" for step in STEPS)]
        for variant, wrong in self.found.items():
            steps = {difference.step for difference in wrong}
            marks = "  ".join(f"{'DIFFERS' if step in steps else 'same':8}" for step in STEPS)
            lines.append(f"{variant.name:{width}}  {variant.ranks:5}  {marks}")
        lines += ["", *self._verdict()]
        return "\n".join(line.rstrip() for line in lines)

    def _verdict(self) -> list[str]:
        if self.healthy:
            return [f"healthy: nothing depends on the layout in {len(self.found)} layouts beside {BASE}"]
        variant = next(variant for variant, wrong in self.found.items() if wrong)
        first = self.found[variant][0]
        return [
            f"FAULT: {first.quantity} is the first quantity that differs, on {variant.name}: {first.detail}",
            f"likely: {HINTS[variant.axis]}",
        ]


# (arguments of `python`, number of ranks, file for all output, seconds) -> exit code; None where it took longer
Launch = Callable[[Sequence[str], int, Path, float], int | None]


def examine(
    config: RunConfig,
    algorithm: str | None = None,
    *,
    max_ranks: int = 2,
    timeout: float = 300.0,
    progress: Callable[[str], None] = lambda line: None,
    launch: Launch | None = None,
) -> Report:
    """Run one update of the configured algorithm on every layout, and compare all with one process.

    Args:
        algorithm: ``module:Class``, ``file.py:Class`` or a registered name, in place of the configured one.
        max_ranks: processes of the largest world.
        timeout: seconds for all layouts of one world size.
        progress: called with a line about what runs.
        launch: starts the ranks; None: `torchrun`.

    Raises:
        ConfigError: the configuration is wrong, or an update failed; the message says on which layout.
    """
    config = with_algorithm(config, algorithm) if algorithm else config
    kind, _ = find_algorithm(config)
    configured = configured_architecture(config)
    under_fsdp2 = configured is None or config.actor.backend == "fsdp2"
    if under_fsdp2:
        progress("under FSDP2: data-parallel layouts, and a plain llama where the model has no family")
    small = shrunk(configured or PLAIN)
    worlds = variants_for(max_ranks, small.experts is not None, under_fsdp2)
    with tempfile.TemporaryDirectory(prefix="megatron_rl_doctor_") as name:
        folder = Path(name)
        plan = Plan(
            config=config,
            folder=folder,
            max_ranks=max_ranks,
            has_experts=small.experts is not None,
            under_fsdp2=under_fsdp2,
            timeout=timeout,
        )
        write_random_model(plan.actor, small, seed=1)
        write_random_model(folder / "reference", small, seed=2)
        write_random_model(folder / "critic", replace(small, value_model=True), seed=3)
        (folder / "plan.json").write_text(plan.model_dump_json())
        results: dict[Variant, Measured] = {}
        for ranks, variants in worlds.items():
            progress(f"{ranks} rank{'s' * (ranks > 1)}: {', '.join(variant.name for variant in variants)}")
            run_world(plan, ranks, timeout, launch or torchrun)
            results |= read_world(plan, ranks, variants, small)
    base = next(results[variant] for variant in results if variant.name == BASE)
    found = {v: list(differences(base, result)) for v, result in results.items() if v.name != BASE}
    data = "preference pairs" if issubclass(kind, OfflineAlgorithm) else "samples with rewards"
    subject = f"{kind.__name__} on random {data}; a random {small.family} of {small.num_layers} layers, fp32, plain SGD"
    return Report(subject, found)


def with_algorithm(config: RunConfig, name: str) -> RunConfig:
    """The configuration with another algorithm; fields of the old one are kept where the new one has them."""
    values = {**config.algorithm, "name": f"{USER_CODE}{name}" if ":" in name and USER_CODE not in name else name}
    kind, _ = find_algorithm(config.model_copy(update={"algorithm": {"name": values["name"]}}))
    kept = {key: value for key, value in values.items() if key == "name" or key in kind.Config.model_fields}
    return config.model_copy(update={"algorithm": kept})


def configured_architecture(config: RunConfig) -> Architecture | None:
    """The architecture of the configured model if its config is on this machine; else a plain Llama. None where it has
    no family, so that FSDP2 trains it."""
    path = Path(config.model_config_path or config.model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        return PLAIN
    try:
        return architecture_from_hf(read_hf_config(folder))
    except NoFamilyError:
        return None


def torchrun(arguments: Sequence[str], ranks: int, log: Path, timeout: float) -> int | None:
    """A `Launch` on this machine's CPUs, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_world(plan: Plan, ranks: int, timeout: float, launch: Launch) -> None:
    """All variants of one world size in one launch.

    Raises:
        ConfigError: it failed, or took longer than ``timeout`` seconds.
    """
    log = plan.folder / f"log_{ranks}"
    arguments = ["-m", "megatron_rl.run.doctor.measure", str(plan.folder / "plan.json"), str(ranks)]
    code = launch(arguments, ranks, log, timeout)
    if code == 0:
        return
    running = plan.folder / "running"
    layout = running.read_text() if running.exists() else "starting"
    if code is None:
        raise ConfigError(f"the update did not end within {timeout:.0f} s on {ranks} ranks ({layout}): raise --timeout")
    raise ConfigError(f"the update failed on layout {layout!r}: {last_error(log.read_text())}")


def last_error(log: str) -> str:
    """The line of a log that says what went wrong, before torchrun's own."""
    lines = [re.sub(r"^\[rank\d+\]: *", "", line).strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "torch.distributed.elastic" not in line]
    own = [line for line in errors if "ChildFailedError" not in line]
    return own[0] if own else "\n".join(lines[-15:])


def read_world(plan: Plan, ranks: int, variants: list[Variant], actor: Architecture) -> dict[Variant, Measured]:
    """The measurements of one world size."""
    raw = torch.load(plan.result(ranks), weights_only=True)
    results = {}
    for variant in variants:
        gradients: dict[str, Tensor] = {}
        for role, architecture in {"actor": actor, "critic": replace(actor, value_model=True)}.items():
            folder = plan.export(variant, role)
            if folder.is_dir():
                before, after = (read_model(place, architecture) for place in (plan.folder / role, folder))
                gradients |= {f"{role}'s {name}": after[name].double() - before[name].double() for name in before}
        results[variant] = Measured(raw[variant.name]["fields"], raw[variant.name]["metrics"], gradients)
    return results
