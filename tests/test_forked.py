"""The warm process: forks are ranks as torchrun starts them; one that fails or hangs ends all; their cost is told."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_forked, run_ranks, start_forked

RANK = """
import os, sys, random, numpy, torch, torch.distributed as dist
from helper_beside_the_program import NAME
dist.init_process_group("gloo")
parts = [None] * dist.get_world_size()
draws = (random.random(), numpy.random.rand())
dist.all_gather_object(parts, (int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"], draws, os.getpid()))
assert __name__ == "__main__" and sys.argv[1:] == ["a", "1"] and NAME == "helper"
assert len({part[2][0] for part in parts}) == len({part[2][1] for part in parts}) == 3
assert len({part[3] for part in parts}) == 3
x = torch.ones(3, requires_grad=True)
(x * 2).sum().backward()
dist.all_reduce(x.grad)
print("rank", dist.get_rank(), [part[:2] for part in parts], x.grad[0].item(), os.environ["OWN"])
"""


def written(folder: Path, text: str) -> Path:
    program = folder / "program.py"
    program.write_text(text)
    return program


def test_ranks_meet_draw_apart_and_are_told_what_torchrun_tells(tmp_path):
    (tmp_path / "helper_beside_the_program.py").write_text("NAME = 'helper'")
    program = written(tmp_path, RANK)
    out = run_ranks(program, 3, "a", 1, timeout=60, OWN="set")
    parts = [(rank, "3") for rank in range(3)]
    assert out.splitlines() == [f"rank {rank} {parts} 6.0 set" for rank in range(3)]
    assert run_ranks(program, 3, "a", 1, timeout=60, OWN="again").count("again") == 3


def test_the_end_of_a_process_is_that_of_python(tmp_path):
    text = (
        "import atexit, sys, threading, time, os\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print(os.environ.get('RANK'), sys.stdin.read())\n"
        "sys.exit('a message')"
    )
    ended = run_forked(written(tmp_path, text), timeout=30)
    assert (ended.code, ended.out, ended.err) == (1, "None \nthread\nat exit\n", "a message\n")


def test_a_rank_that_fails_ends_the_others_and_its_traceback_is_shown(tmp_path):
    text = (
        "import os, time\n"
        "if os.environ['RANK'] == '1': raise KeyError('mine')\n"
        "print('waits', flush=True)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)failed \(1\)\n.*Traceback.*KeyError: 'mine'") as failure:
        run_ranks(written(tmp_path, text), 3, timeout=50)
    assert "waits" in str(failure.value)
    assert time.monotonic() - started < 40


def test_ranks_that_do_not_end_are_killed_with_what_they_started(tmp_path):
    text = (
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, os.getpid(), flush=True)\n"
        "time.sleep(600)"
    )
    with pytest.raises(AssertionError, match="did not end in 3 s") as failure:
        run_ranks(written(tmp_path, text), 2, timeout=3)
    started = [pid for pair in re.findall(r"^(\d+) (\d+)$", str(failure.value), re.MULTILINE) for pid in pair]
    assert len(started) == 4
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in started)


def alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_in_the_background_runs_beside_another_and_ends_with_its_block(tmp_path):
    go, came = tmp_path / "go", tmp_path / "came"
    text = (
        "import sys, time\nfrom pathlib import Path\nwhile not Path(sys.argv[1]).exists(): time.sleep(0.01)\n"
        "print('went')\nsys.exit(3)\n"
    )
    with start_forked(written(tmp_path, text), go, timeout=60) as first:
        other = tmp_path / "other.py"
        other.write_text(f"import pathlib\npathlib.Path({str(go)!r}).touch()\nprint('other')\n")
        assert run_forked(other, timeout=60).out == "other\n"
        ended = first.wait()
        assert (ended.code, ended.out, ended.late) == (3, "went\n", False)
    endless = f"import os, pathlib, time\npathlib.Path({str(came)!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    with start_forked(written(tmp_path, endless), timeout=600):
        while not (came.exists() and came.read_text()):
            time.sleep(0.01)
    assert not alive(came.read_text())


def test_what_is_read_when_a_process_starts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['OMP_NUM_THREADS'\] are read when a process starts"):
        run_forked(written(tmp_path, ""), OMP_NUM_THREADS="2")


BURN = """
import subprocess, sys, pytest
@pytest.mark.parametrize("case", range(2))
def test_burn(case):
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.7: pass"], check=True)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "two workers"])
def test_cpu_time_of_children_is_summed_over_workers_and_pytest_has_the_last_line(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom cpu_time import CpuTime\n"
        "def pytest_configure(config): config.pluginmanager.register(CpuTime(config))\n"
    )
    (tmp_path / "test_burn.py").write_text(BURN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "test_burn.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("2 passed"), done.stdout
    minutes = float(next(line for line in lines if line.startswith("CPU time: ")).split()[2])
    module = float(next(line for line in lines if line.endswith("test_burn.py")).split()[0])
    assert 1.3 <= module < 60
    assert minutes * 60 > module - 3
