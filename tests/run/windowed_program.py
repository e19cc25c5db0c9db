"""A run with an engine whose every sixth answer takes half a second: more than a step, which others do not wait for."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from megatron_rl.cli import main
from megatron_rl.rollout import ENGINES, LocalEngine

SLOW_S, FAST_S = 0.5, 0.01


@ENGINES.register("uneven")
class UnevenEngine(LocalEngine):
    """The local engine, which answers group by group."""

    def submit(self, prompts: Any, params: Any, seeds: Any) -> Any:
        futures = []
        for prompt, answer in zip(prompts, self.generate(prompts, params, seeds), strict=True):
            futures.append(Future())
            threading.Timer(SLOW_S if sum(prompt) % 6 == 0 else FAST_S, futures[-1].set_result, (answer,)).start()
        return futures


if __name__ == "__main__":
    import sys

    sys.argv.insert(1, "train")
    main()
