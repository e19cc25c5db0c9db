"""Building on first use: once per content, by one process, bounded in time, and never a broken library."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_rl.ops import extension
from megatron_rl.ops.extension import Build, built, cpu_build
from megatron_rl.ops.selection import UnavailableError

COMPILER = """#!/bin/sh
echo run >> {log}
for last; do :; done
echo half > "$last"
sleep {seconds}
{end}
echo library > "$last"
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRON_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(folder: Path, seconds: float = 0.0, end: str = "") -> Build:
    """A build whose compiler writes half a library, waits, ends as told or completes it; it logs each run."""
    path = folder / "compiler"
    path.write_text(COMPILER.format(log=folder / "log", seconds=seconds, end=end))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    source = folder / "source.cpp"
    source.write_text("int x;")
    return Build("ops_test", str(path), ("-O3",), (source,))


def num_runs(folder: Path) -> int:
    return (folder / "log").read_text().count("run")


def test_the_second_start_does_not_compile(tmp_path, cache):
    build = compiler(tmp_path)
    assert built(build) == built(build)
    assert built(build).read_text() == "library\n"
    assert num_runs(tmp_path) == 1


def test_eight_ranks_that_start_together_compile_once(tmp_path, cache):
    build = compiler(tmp_path, seconds=0.3)
    with ThreadPoolExecutor(8) as ranks:
        libraries = list(ranks.map(lambda _: built(build), range(8)))
    assert len(set(libraries)) == 1
    assert num_runs(tmp_path) == 1


def test_eight_ranks_learn_of_a_failure_by_one_compilation(tmp_path, cache):
    build = compiler(tmp_path, seconds=0.3, end="echo 'error: no such header' >&2; exit 1")

    def attempt(_: int) -> str:
        with pytest.raises(UnavailableError) as caught:
            built(build)
        return str(caught.value)

    with ThreadPoolExecutor(8) as ranks:
        reasons = list(ranks.map(attempt, range(8)))
    assert all("no such header" in reason for reason in reasons)
    assert num_runs(tmp_path) == 1
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob("*.partial"))
    attempt(0)
    assert num_runs(tmp_path) == 2  # a later start tries again


def test_a_compiler_that_hangs_is_stopped_and_leaves_no_library(tmp_path, cache):
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="timed out"):
        built(compiler(tmp_path, seconds=30), timeout=1.0)
    assert time.monotonic() - start < 20
    assert not list(cache.glob("*.so"))


def test_waiting_for_another_process_is_bounded(tmp_path, cache):
    build = compiler(tmp_path)
    cache.mkdir()
    with (cache / f"ops_test-{build.key()}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="another process is still building"):
            built(build, timeout=0.2)


def test_a_file_system_without_locks_costs_a_compilation_not_the_start(tmp_path, cache, monkeypatch, caplog):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(extension.fcntl, "flock", unsupported)
    assert built(compiler(tmp_path)).read_text() == "library\n"
    assert "No locks available" in caplog.text


def test_a_changed_source_flag_or_compiler_is_another_library(tmp_path, cache):
    build = compiler(tmp_path)
    keys = {build.key(), Build(build.name, build.compiler, ("-O2",), build.sources).key()}
    (tmp_path / "source.cpp").write_text("int y;")
    keys.add(build.key())
    os.utime(tmp_path / "compiler", (1, 1))
    keys.add(build.key())
    assert len(keys) == 4


def test_no_compiler_and_no_sources_are_reasons(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnavailableError, match="no compiler"):
        cpu_build()
    monkeypatch.undo()
    monkeypatch.setattr(extension, "SOURCES", tmp_path / "nowhere")
    with pytest.raises(UnavailableError, match="no sources in"):
        cpu_build()


def test_a_library_that_does_not_load_is_unavailable(tmp_path):
    (tmp_path / "broken.so").write_text("not ELF")
    with pytest.raises(UnavailableError, match="does not load"):
        extension._load(tmp_path / "broken.so")
