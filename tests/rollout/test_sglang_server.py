"""Server processes without SGLang: what would run, and that nothing survives its owner however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rollout.rollout_models import CONFIGS, architecture_of, random_model

from megatron_rl.config import ConfigError
from megatron_rl.rollout.sglang.model_folder import check_cpu_layout, check_served, write_model_folder
from megatron_rl.rollout.sglang.server import (
    CPU_SHIM,
    SERVER_MODULES,
    ServerConfig,
    SGLangServer,
    launch_command,
    launch_environment,
    server_python,
)

pytestmark = pytest.mark.timeout(60)
# Stands for a server: it has a child in its own process group and ends for nothing but SIGKILL.
STUBBORN = """#!/bin/sh
trap '' TERM
sleep 300 &
echo $$ $! > {pids}
wait
sleep 300
"""


def stand_in(folder: Path, text: str) -> ServerConfig:
    program = folder / "python"
    program.write_text(text)
    program.chmod(0o755)
    return ServerConfig(python=str(program), log_dir=str(folder), start_timeout=20.0)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def command(**changes: object) -> list[str]:
    known: dict = {"python": "py", "model_path": Path("/m"), "port": 7, "tp": 2, "dtype": "bfloat16"}
    known |= {"max_running": 4, "device": "cpu"}
    config = ServerConfig(args={"mem_fraction_static": 0.5, "enable-metrics": True, "disable-radix-cache": False})
    return launch_command(config, **known | changes)


def test_the_command_holds_what_the_job_and_the_user_say() -> None:
    line = " ".join(command())
    for part in ("-m sglang.launch_server", "--model-path /m", "--port 7", "--tp 2", "--load-format dummy"):
        assert part in line
    assert "--attention-backend torch_native" in line
    assert "--mem-fraction-static 0.5 --enable-metrics" in line
    assert "disable-radix-cache" not in line
    on_gpu = " ".join(command(device="cuda", load_weights=True))
    assert "torch_native" not in on_gpu
    assert "max-total-tokens" not in on_gpu
    assert "dummy" not in on_gpu


def test_the_environment_makes_no_rank_of_the_server_and_shims_it_only_on_a_cpu() -> None:
    own = {"RANK": "1", "MASTER_PORT": "5", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "/p", "HOME": "/h"}
    on_cpu, on_gpu = launch_environment(own, "cpu", 2), launch_environment(own, "cuda", 2, devices="2,3")
    assert on_cpu["PYTHONPATH"].split(os.pathsep) == [str(CPU_SHIM), str(SERVER_MODULES)]
    assert on_cpu["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    kept_alive = {"SGLANG_TIMEOUT_KEEP_ALIVE": "60"}
    assert on_gpu == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "2,3", "PYTHONPATH": str(SERVER_MODULES)} | kept_alive
    assert launch_environment(own | {"SGLANG_TIMEOUT_KEEP_ALIVE": "9"}, "cpu", 1)["SGLANG_TIMEOUT_KEEP_ALIVE"] == "9"


def test_closing_ends_the_server_and_its_children_even_stubborn_ones(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    server = SGLangServer("/m", stand_in(tmp_path, STUBBORN.format(pids=pids)))
    server.launch()
    assert eventually(pids.exists)
    assert eventually(lambda: len(pids.read_text().split()) == 2)
    family = [int(pid) for pid in pids.read_text().split()]
    server.close()
    server.close()
    assert not any(map(lives, family))
    assert not server.is_running


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exception"])
def test_the_server_ends_when_its_owner_does(tmp_path: Path, end: str) -> None:
    pids = tmp_path / "pids"
    settings = stand_in(tmp_path, STUBBORN.format(pids=pids))

    def own() -> None:
        SGLangServer("/m", settings).launch()
        assert eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        if end == "exception":
            raise KeyError
        time.sleep(300)

    owner = multiprocessing.get_context("fork").Process(target=own)
    owner.start()
    assert eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    family = [int(pid) for pid in pids.read_text().split()]
    if end != "exception":
        os.kill(owner.pid or 0, getattr(signal, end))
    owner.join(20)
    assert eventually(lambda: not any(map(lives, family)))


def test_a_server_that_ends_while_it_starts_shows_its_last_words(tmp_path: Path) -> None:
    settings = stand_in(tmp_path, "#!/bin/sh\necho no such model\nexit 3\n")
    with pytest.raises(RuntimeError, match=r"ended while it started.*ends with:\n.*no such model"):
        SGLangServer("/m", settings).start()


def test_a_server_whose_port_was_taken_meanwhile_is_started_on_another(tmp_path: Path) -> None:
    noise = "echo said afterwards\n" * 40
    text = f"#!/bin/sh\necho $@ >> {tmp_path}/starts\necho address already in use\n{noise}exit 1\n"
    server = SGLangServer("/m", stand_in(tmp_path, text))
    with pytest.raises(RuntimeError, match="ended while it started"):
        server.start()
    starts = (tmp_path / "starts").read_text().splitlines()
    ports = {line.split("--port ")[1].split()[0] for line in starts}
    assert len(starts) == len(ports) == 3


def test_a_server_that_is_never_ready_is_given_up_and_ended(tmp_path: Path) -> None:
    settings = stand_in(tmp_path, STUBBORN.format(pids=tmp_path / "pids")).model_copy(update={"start_timeout": 1.0})
    server = SGLangServer("/m", settings)
    with pytest.raises(RuntimeError, match="not ready in 1 s"):
        server.start()
    assert not server.is_running


def test_a_missing_python_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"no Python at /nowhere.*make setup-sglang.*urls"):
        server_python(ServerConfig(python="/nowhere"))


def test_sizes_that_a_cpu_server_would_pad_are_refused(tmp_path: Path) -> None:
    architecture = architecture_of(random_model("llama").config)
    check_cpu_layout(architecture, 2)
    with pytest.raises(ConfigError, match=r"num_key_value_heads=2 is not a multiple of 4"):
        check_cpu_layout(architecture, 4)
    folder = write_model_folder(tmp_path / "model", architecture, None, "bfloat16")
    assert "LlamaForCausalLM" in (folder / "config.json").read_text()


def test_models_that_sglang_would_compute_otherwise_are_refused() -> None:
    windowed = architecture_of(CONFIGS["mistral"])
    check_served(windowed, max_context=9)
    with pytest.raises(ConfigError, match=r"sliding window of 9 tokens.*contexts of 10.*context_length to 9"):
        check_served(windowed, max_context=10)
    check_served(architecture_of(CONFIGS["mixtral"]), max_context=128)
    with pytest.raises(ConfigError, match="SGLang computes Mixtral with heads of hidden / heads = 8 channels"):
        check_served(replace(architecture_of(CONFIGS["mixtral"]), head_dim=16), max_context=128)


LINEAR = (("factor", 8.0), ("rope_type", "linear"))
LONGROPE = (("long_factor", (4.0,) * 4), ("original_max_position_embeddings", 64), ("rope_type", "longrope"))


@pytest.mark.parametrize(
    ("family", "changes", "refused"),
    [
        ("gemma", {"rope_scaling": LINEAR}, "gemma with plain rotary positions"),
        ("gemma2", {"rope_scaling": LINEAR}, "gemma2 with plain rotary positions"),
        ("gemma", {"qkv_bias": True}, "no biases in attention"),
        ("gemma3_text", {"attention_softcap": 50.0}, "attn_logit_softcapping=50.0"),
        ("phi3", {"rope_scaling": LONGROPE}, "one is longer than 64 tokens: set .*context_length to 64"),
    ],
)
def test_what_sglangs_classes_leave_out_is_refused(family, changes, refused) -> None:
    plain = replace(architecture_of(CONFIGS["llama"]), family=family)
    check_served(plain, max_context=128)
    with pytest.raises(ConfigError, match=refused):
        check_served(replace(plain, **changes), max_context=128)
    if "context_length" in refused:
        check_served(replace(plain, **changes), max_context=64)
