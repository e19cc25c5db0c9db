"""Two servers are started once for all tests of this folder that take them as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rollout.engine_contract import Loaded


@pytest.fixture(scope="session")
def pair() -> Iterator[Loaded]:
    from integration.servers import start_pair  # a skipped or deselected test needs no model

    yield from start_pair()


@pytest.fixture(scope="module")
def loaded(pair: Loaded) -> Loaded:
    """With the weights of `integration.servers.MODEL` as version 7, whatever other tests left."""
    pair.engine.load_shards(pair.shards, 7)
    return pair
