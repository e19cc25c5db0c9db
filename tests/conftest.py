"""Shared by all tests: their order, and where the optional real model and data lie."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from cpu_time import CpuTime

import megatron_rl  # noqa: F401  first of all: the CPU face must be in place before a test imports megatron.core

# The machine may be busy: how long an example takes says nothing. The same examples in every run.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("distributed", "learning", "integration", "network")  # markers, from minutes to many minutes


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTime(config))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are named by their number: content may hold a time, and both workers must give a test the same name."""
    return f"{len(val)}bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, so that what fails in seconds does not wait for minutes; none that lacks its data."""
    items.sort(key=lambda item: max((SLOW.index(m.name) + 1 for m in item.iter_markers() if m.name in SLOW), default=0))
    lacking = [item for item in items if SHARED is None and "shared_dir" in getattr(item, "fixturenames", ())]
    if lacking:
        config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if item not in lacking]


def find_shared() -> Path | None:
    """The folder with the optional real model and data: $MEGATRON_RL_TEST_DATA, or ``../shared`` beside the project."""
    for candidate in (os.environ.get("MEGATRON_RL_TEST_DATA"), ROOT.parent / "shared"):
        if candidate and (Path(candidate) / "models").is_dir():
            return Path(candidate)
    return None


SHARED = find_shared()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real models and data. What asks for it is an extra: without such a folder it is not collected."""
    assert SHARED is not None
    return SHARED


@pytest.fixture(scope="session")
def stories_model(shared_dir: Path) -> Path:
    """A real pretrained Llama of 260,032 parameters as a Hugging Face folder."""
    return shared_dir / "models" / "stories260k-hf"


@pytest.fixture(scope="session")
def seeded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the same shape with random weights, as a Hugging Face folder."""
    from seeded_model import write_seeded_model  # torch and transformers, which not every test needs

    return write_seeded_model(tmp_path_factory.mktemp("seeded") / "model")


@pytest.fixture(scope="session", params=["seeded", *(["stories"] if SHARED else [])])
def llama_folder(request: pytest.FixtureRequest) -> Path:
    """The seeded model, and the real one where it is at hand."""
    return request.getfixturevalue(f"{request.param}_model")
