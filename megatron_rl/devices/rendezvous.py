"""A store for the process group in which no key of an earlier start of the same job can be read.

torchrun's agents lend their ranks one store for all restarts (torch 2.13, TORCHELASTIC_USE_AGENT_STORE), in which the
addresses of dead ranks remain; and agents count restarts differently, so that count does not tell starts apart. Here
the ranks that are alive agree on a name for this start: rank 0 chooses it, every other rank answers under it with a
token of its own, and continues when rank 0 has repeated that token. Tokens of an earlier start are never repeated.
"""

from __future__ import annotations

import json
import time
import uuid

from torch.distributed import PrefixStore, Store

START = "megatron_rl/start"  # key of the name of the newest start
POLL_SECONDS = 0.02


def store_of_this_start(store: Store, rank: int, world_size: int, timeout: float) -> Store:
    """``store`` under a prefix that only the ranks of this start know. Collective.

    Args:
        timeout: seconds that ranks may take to start.

    Raises:
        TimeoutError: a rank did not start in time.
    """
    deadline = time.monotonic() + timeout
    word = uuid.uuid4().hex
    if rank == 0:
        store.set(START, word)
        answers = [f"{START}/{word}/{other}" for other in range(1, world_size)]
        while not (store.check(answers) if answers else True):
            _wait(deadline, f"rank 0 waits for {world_size - 1} other ranks to start")
        words = [store.get(answer).decode() for answer in answers]
        store.set(f"{START}/{word}/all", json.dumps(words))
        return PrefixStore(f"{START}/{word}", store)
    while True:
        start = store.get(START).decode() if store.check([START]) else None
        if start is not None:
            store.set(f"{START}/{start}/{rank}", word)
            if store.check([f"{START}/{start}/all"]):
                words = json.loads(store.get(f"{START}/{start}/all"))
                if words[rank - 1 :][:1] == [word]:
                    return PrefixStore(f"{START}/{start}", store)
        _wait(deadline, f"rank {rank} waits for rank 0 to start")


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{what}: none came in time; see the other ranks' output")
    time.sleep(POLL_SECONDS)
