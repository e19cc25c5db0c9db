"""docs/configuration.md says what the configuration classes say, and they say something about every field."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from conftest import ROOT

from megatron_rl.config.record import known_keys
from megatron_rl.run import RunConfig


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("document_config", ROOT / "tools" / "document_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_of_a_run_has_its_row(tool):
    rows = {line.split("`")[1] for line in tool.document().splitlines() if line.startswith("| `")}
    assert {key.rpartition(".")[2] for key in known_keys(RunConfig)} <= rows


def test_every_field_has_a_docstring(tool):
    records = [RunConfig, *(record for _, record in tool.nested("", RunConfig))]
    records += [
        record for registry in (tool.ALGORITHMS, tool.REWARDS, tool.TRACKERS) for _, record in tool.family(registry)
    ]
    undocumented = [
        f"{record.__qualname__}.{name}"
        for record in records
        for name, field in record.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


def test_the_page_is_up_to_date(tool):
    assert tool.TARGET.read_text() == tool.document(), "run: python tools/document_config.py"
