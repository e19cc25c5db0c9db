"""Run on 4 ranks: tensor-parallel engines over 2 and 4 ranks against one rank; prints each case checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from rollout.rollout_models import Cutter, architecture_of, layout_of, local_engine, random_model

from megatron_rl.rollout import LocalEngine, SamplingParams

PROMPTS = [[5, 9, 11, 40, 3], [7], [20, 21, 22, 23, 24, 25, 26, 27, 28], [99, 98, 97], [60, 2]]


@dataclass(frozen=True)
class Case:
    model: str
    tp: int
    expert_parallel: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} tp{self.tp}{' ep' * self.expert_parallel}"


CASES = [
    Case("llama", 2),
    Case("llama", 4),  # 2 key heads on 4 ranks: replicated
    Case("qwen2", 2),
    Case("qwen3", 4),
    Case("qwen3_moe", 2),
    Case("qwen3_moe", 2, expert_parallel=True),
]


def check(case: Case, group: dist.ProcessGroup) -> None:
    model = random_model(case.model)
    architecture = architecture_of(model.config)
    tp_rank = dist.get_rank(group)
    shards = Cutter(architecture, model.state_dict(), case.tp, tp_rank, case.expert_parallel).cut()
    layout = layout_of(shards, ranks=4)
    engine = LocalEngine(architecture, layout, dist.get_rank(), tp_group=group, eos_token_ids=[2], max_running=6)
    engine.load_shards(shards, 1)
    whole = local_engine(model, eos_token_ids=[2])
    for params in (
        SamplingParams(max_tokens=16, temperature=0),
        SamplingParams(n=3, max_tokens=16, temperature=0.9, top_p=0.95, stop_token_ids=(10, 20, 30)),
    ):
        ours, expected = engine.generate(PROMPTS, params), whole.generate(PROMPTS, params)
        for mine, theirs in zip(ours, expected, strict=True):
            assert [c.token_ids for c in mine] == [c.token_ids for c in theirs], (case, tp_rank)
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for case in CASES:
        group = pairs[dist.get_rank() // 2] if case.tp == 2 else dist.group.WORLD
        assert group is not None
        check(case, group)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"checked {case.name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
