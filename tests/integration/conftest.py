"""Servers are started once for all tests of this folder that take them as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rollout.engine_contract import Loaded


@pytest.fixture(scope="session")
def loaded() -> Iterator[Loaded]:
    from integration.servers import start_pair  # a skipped or deselected test needs no model

    yield from start_pair()
