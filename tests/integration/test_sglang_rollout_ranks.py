"""Real SGLang servers on rollout ranks: they get their shards across the bridge, and sample while others train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from integration.environment import ROOT, sglang_python
from torchrun import run_torchrun
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.config import load_user_object
from megatron_rl.tracking import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ARITHMETIC = ROOT / "examples" / "arithmetic_grpo"
BF16 = 0.05  # a log-probability of the server in bf16 against the trainer's in fp32


def write_config(folder: Path, tp: int) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ARITHMETIC / "model_sglang")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    load_user_object(f"{ARITHMETIC}/arithmetic.py:build_tokenizer")().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 20) for b in range(10, 14)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = {"python": sglang_python(), "max_total_tokens": 4096, "log_dir": str(folder / "servers")}
    values = {
        "model": str(folder / "model"),
        "actor": {
            "optimizer": {"learning_rate": 1e-2},
            "sampling": {"n": 4, "max_tokens": 5},
            "rollout": {"engine": "sglang", "tp": tp, "dtype": "bfloat16", "options": {"server": server}},
        },
        "data": {"path": str(folder / "train.jsonl")},
        "prompts_per_step": 8,
        "rewards": [{"name": f"python:{ROOT}/tests/run/small_run.py:digits"}],
        "trainer": {"output_dir": str(folder / "out"), "num_steps": 3, "export": False, "save_at_end": False},
        "tracking": {"trackers": ["jsonl"]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("ranks", "tp", "lag"), [(1, 1, 1), (4, 2, 0)])
def test_servers_of_rollout_ranks_serve_what_was_trained(ranks: int, tp: int, lag: int, tmp_path: Path) -> None:
    """One server beside one training rank, a step ahead of it; two servers of two ranks each."""
    config = write_config(tmp_path, tp)
    overrides = (f"parallel.rollout_ranks={ranks}", f"rollout_lag={lag}")
    paths = ":".join(map(str, (ROOT, ROOT / "tests" / "run", ROOT / "tests")))
    run_torchrun(ROOT / "tests/run/train_program.py", ranks + 1, str(config), *overrides, timeout=580, PYTHONPATH=paths)
    metrics = read_metrics(tmp_path / "out" / "metrics.jsonl")
    for step in range(1, 4):
        assert metrics[step]["rollout/staleness_max"] == min(step - 1, lag)
        fresh = metrics[step]["mismatch/stale_fraction"] == 0
        assert fresh == (lag == 0 or step == 1)
        difference = metrics[step]["mismatch/logprob_difference_max"]
        assert difference < BF16 if fresh else difference > BF16, "weights one step old are told from the newest"
    moved = [metrics[step]["weight_sync/wire_bytes"] for step in range(1, 4)]
    assert moved == moved[:1] * 3
    assert moved[0] > 0
