"""Two tensor-parallel ranks ask a server that never gives the same answer twice; see `test_shared_reward.py`."""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_rl import RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.rewards import RewardError


def batch() -> Batch:
    prompts = [Prompt([1], text=f"question {i} ", index=i) for i in range(6)]
    return Batch(samples=[Sample(p, [2], [0.0], response_text="x") for p in prompts])


def main(url: str) -> None:
    context = ParallelContext.create(ParallelSizes(tp=2))
    service = RewardModel(f"{url}/moods", kind="http", request={"all": "{texts}"}, path="moods")
    both = RewardModel({"mood": (service.reward, 2.0), "length": lambda sample: float(len(sample.response_text))})
    scored = batch()
    both.score().run(scored)
    mine = (scored.sequences["rewards"].tolist(), [sample.reward_parts for sample in scored.samples])
    first, second = context.gather_objects(mine)
    assert first == second, (first, second)
    assert first[0] == [2 * parts["mood"] + 1 for parts in first[1]]
    counts = context.gather_objects(scored.metrics.get("reward_service/mood/requests_count"))
    assert counts == [1.0, None], counts

    broken = RewardModel(f"{url}/nowhere", kind="http", retries=0)
    try:
        broken.score().run(batch())
    except RewardError as error:
        messages = context.gather_objects(str(error))
    assert all("status 404" in message for message in messages), messages
    if context.rank == 0:
        print("both ranks have the same rewards")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
