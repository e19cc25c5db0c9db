"""The examples run as their READMEs say: the same files and commands, only fewer and shorter steps, on a tiny Llama."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from forked import Ended, run_forked
from made_rows import gsm8k_rows, preference_rows, write_gz

from megatron_rl.config import load_config
from megatron_rl.run import RunConfig

SHORT = ["train.max_steps=2", "train.per_device_train_batch_size=4", "train.warmup_steps=0"]
SHORT_CLI = ["trainer.num_steps=2", "prompts_per_step=4", "actor.sampling.n=4", "actor.sampling.max_tokens=16"]
OFFLINE = ("dpo_pairs", "kto_binary", "reward_model")
ONLINE = ("ppo_math", "grpo_gsm8k", "custom_reward", "custom_algorithm", "use_of_reward_model")
HEROES = [{"prompt": f"Once upon a time, there was a girl named {name}.", "answer": name} for name in ("Lily", "Sue")]


def commands(model: Path, folder: Path) -> list[tuple[str, list[str]]]:
    """Every example's command."""
    real = SHARED / "data" if SHARED else None
    pairs = write_gz(folder / "pairs.jsonl.gz", preference_rows(40), real and real / "hh_harmless_test_pairs.jsonl.gz")
    gsm8k = write_gz(folder / "gsm8k.jsonl.gz", gsm8k_rows(40), real and real / "gsm8k_train.jsonl.gz")
    test = folder / "test.jsonl"
    test.write_text('{"question": "2+2?", "answer": "#### 4"}\n')
    heroes = folder / "heroes.jsonl"
    heroes.write_text("\n".join(map(json.dumps, HEROES * 8)))
    found = [
        (
            name,
            [
                *(f"examples/{name}/train.py", f"model={model}", f"data={pairs}", f"train.output_dir={folder / name}"),
                *(*SHORT, f"{option}.max_length=512"),
            ],
        )
        for name, option in zip(OFFLINE, ("dpo", "kto", "reward"), strict=True)
    ]
    particular = {
        "ppo_math": ["examples/ppo_math/config.yaml", f"data.path={gsm8k}", "actor.dtype=float32"],
        "grpo_gsm8k": [
            *("examples/grpo_gsm8k/config.yaml", f"data.path={gsm8k}", f"evaluation.data.path={test}"),
            *("actor.dtype=float32", "algorithm.max_sampling_rounds=2"),
        ],
        "custom_reward": ["examples/custom_reward/config.yaml", f"data.path={heroes}"],
        "custom_algorithm": ["examples/custom_algorithm/config.yaml", f"data.path={heroes}"],
        "use_of_reward_model": [
            *("examples/reward_model/use.yaml", f"data.path={heroes}"),
            f"rewards=[{{name: model, options: {{model: '{folder / 'reward_model' / 'hf'}'}}}}]",
        ],
    }
    for name, own in particular.items():
        argv = ["megatron-rl", "train", *own, f"model={model}", f"trainer.output_dir={folder / name}", *SHORT_CLI]
        found.append((name, argv))
    return found


@pytest.fixture(scope="module")
def runs(seeded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Ended]]:
    """Each example's folder, and how it ended."""
    folder = tmp_path_factory.mktemp("examples")
    found = {}
    for name, argv in commands(seeded_model, folder):
        program = ["-m", "megatron_rl", *argv[1:]] if argv[0] == "megatron-rl" else argv
        found[name] = (folder / name, run_forked(*program, directory=ROOT, timeout=150))
    return found


@pytest.mark.parametrize("name", [*OFFLINE, *ONLINE])
def test_example_runs_and_leaves_a_model(runs: dict[str, tuple[Path, Ended]], name: str) -> None:
    folder, ended = runs[name]
    assert ended.code == 0, ended.out[-2000:] + ended.err[-4000:]
    assert (folder / "hf" / "model.safetensors").is_file()
    assert list(folder.glob("metrics.jsonl"))


def test_each_reward_of_one_s_own_is_logged(runs: dict[str, tuple[Path, Ended]]) -> None:
    lines = (runs["custom_reward"][0] / "metrics.jsonl").read_text().splitlines()
    assert {f"reward_parts/{name}/mean" for name in ("names_hero", "unlike_the_others", "brevity")} <= set(
        json.loads(lines[0])
    )


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "grpo_gsm8k").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_name_real_keys(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    command = script.read_text().split("-m megatron_rl train ")[1].replace("\\\n", " ")
    config, *arguments = shlex.split(command)
    assert arguments.pop() == "$@"
    run = load_config(RunConfig, ROOT / config, arguments)
    assert (run.model, run.data.path) == ("$model", "$train")
    assert run.parallel.tp == run.actor.rollout.tp > 1
