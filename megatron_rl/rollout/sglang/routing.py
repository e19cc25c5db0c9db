"""Which server gets the next request: plain bookkeeping, without HTTP.

    down --answers--> outdated --weights delivered--> ready --fails--> down
                         |<--answered with other weights--|

Only a ready server gets requests. One that was away holds unknown weights until they are delivered anew.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar


class State(enum.Enum):
    """What is known of one server."""

    OUTDATED = "outdated"  # it answers, but holds no weights that were pushed, or those of an earlier version
    READY = "ready"  # it serves the version committed last
    DOWN = "down"  # it does not answer


@dataclass(eq=False)
class RoutedServer:
    """One server as the router sees it."""

    name: str
    limit: int  # sequences at a time
    state: State = State.DOWN
    load: int = 0  # sequences on their way
    failures: list[str] = field(default_factory=list)  # newest last

    def __str__(self) -> str:
        last = f", last: {self.failures[-1]}" if self.failures else ""
        return f"{self.name} {self.state.value} ({len(self.failures)} failures{last})"


P = TypeVar("P", bound=RoutedServer)


def choose(servers: Sequence[P], sequences: int, failed_on: Sequence[P] = ()) -> P | None:
    """The least loaded ready server that has room, or None: wait, or ask again when something has changed.

    Args:
        sequences: of the request; one that is larger than a server's limit gets an idle server.
        failed_on: servers that this request failed on, once for each time; those with the fewest are asked.
    """
    ready = [server for server in servers if server.state is State.READY]
    fewest = min(map(failed_on.count, ready), default=0)
    ready = [server for server in ready if failed_on.count(server) == fewest]
    free = [server for server in ready if server.load == 0 or server.load + sequences <= server.limit]
    return min(free, key=lambda server: server.load, default=None)
