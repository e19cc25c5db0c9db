"""Run on 1 or 2 ranks: episodes in a flow at any layout, and the weights after steps on them; writes what it found.

flow_program.py MODEL OUT TP ROLLOUT_TP
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl import GRPO, Actor, RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.environments import Environment, EpisodeError, Step
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelSizes
from megatron_rl.rewards import FunctionReward
from megatron_rl.run import Evaluation

QUESTIONS = ["What is 12 + 345?", "Tim was sad.", "One day, Amy", "birds sing songs"]


class Counting(Environment):
    """Rewards even numbers of letters, until the third turn."""

    fails = ""  # the question whose environment raises

    def reset(self, prompt: Prompt) -> Any:
        self.text, self.turns = prompt.text, 0
        return prompt.text

    def step(self, message: Any) -> Step:
        if self.text == self.fails:
            raise OSError("no connection")
        self.turns += 1
        return Step(f"turn {self.turns}", reward=float(len(message["content"]) % 2 == 0), done=self.turns == 3)


class Failing(Counting):
    fails = QUESTIONS[1]


def short(sample: Sample) -> float:
    return 1.0 / (1 + len(sample.response_text))


def main() -> None:
    model, out, tp, rollout_tp = sys.argv[1:]
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    config = {
        "sampling": {"n": 3, "max_tokens": 12, "stop": [".", "e", "a"]},
        "rollout": {"tp": int(rollout_tp)},
        "optimizer": {"learning_rate": 1e-3},
    }
    actor = Actor(model, tokenizer, parallel=ParallelSizes(tp=int(tp)), config=config)
    dp, size = actor.context.coordinates.dp, actor.context.dp_size
    prompts = [Prompt([1], text=text, index=i) for i, text in enumerate(QUESTIONS)]
    own = prompts[len(prompts) * dp // size : len(prompts) * (dp + 1) // size]
    grpo = GRPO(actor=actor)
    episodes = actor.episodes(Counting)
    alone = actor.sample(environment=episodes) >> grpo.update()
    added = actor.sample(environment=episodes) >> RewardModel({"short": (short, 0.5)}).score() >> grpo.update()
    found: dict[str, Any] = {}
    for name, flow in (("alone", alone), ("added", added)):
        batch = flow(Batch(prompts=list(own)))
        samples = [
            [s.prompt.index, s.prompt.token_ids, s.response_ids, s.response_mask, s.finish_reason, s.reward]
            for s in batch.samples
        ]
        parts = actor.context.gather_objects((dp, samples))
        found[name] = [sample for _, part in sorted(dict(parts).items()) for sample in part]
        found[f"{name}/loss"] = batch.metrics["loss/policy"]
        found[f"{name}/turns"] = batch.metrics["environment/turns_mean"]
    evaluation = Evaluation(actor, prompts, FunctionReward(short), environment=episodes)
    found["eval"] = evaluation()["eval/reward"]
    try:
        (actor.sample(environment=Failing) >> grpo.update())(Batch(prompts=list(own)))
        found["failure"] = ["nothing"]
    except (EpisodeError, RuntimeError) as error:
        found["failure"] = actor.context.gather_objects(f"{type(error).__name__}: {error}")
    dropped = actor.sample(environment=actor.episodes({"name": f"python:{__file__}:Failing", "on_failure": "drop"}))
    batch = (dropped >> grpo.update())(Batch(prompts=list(own)))
    found["kept"] = sorted({s.prompt.index for part in actor.context.gather_objects(batch.samples) for s in part})
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    actor.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
