"""`RewardModel`: whatever turns samples into rewards, as a stage.

RewardModel(score_fn)                     a function of one `Sample`
RewardModel(MathReward())                 any `Reward`
RewardModel({"correct": r1, "format": (r2, 0.2)})   several, weighted
RewardModel("path/to/classifier")         a model with a value head, run by this job: see `score_model`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_rl.batch import Batch, Sample
from megatron_rl.dataflow import Stage
from megatron_rl.rewards import Reward, as_reward
from megatron_rl.workers.score_model import ScoreModel, is_model


class RewardModel:
    """Scores samples.

    Args:
        source: a function ``Sample -> float``, a `Reward`, or a mapping of names to rewards or (reward, weight) pairs;
            or a model: a Hugging Face sequence classifier with one label (folder, id or model) or Megatron chunks with
            a `ValueHead`.
        options: of `as_reward`, or of `ScoreModel` (``tokenizer``, ``context``).

    Raises:
        ConfigError: ``source`` is none of these.
    """

    def __init__(self, source: Callable[[Sample], float] | Reward | Mapping[str, Any] | Any, **options: Any) -> None:
        if is_model(source):
            self.reward: Reward = ScoreModel(model=source, **options)
        else:
            self.reward = as_reward(source, **options)

    def score(self) -> Stage:
        """A stage that writes ``rewards`` fp32 ``[num_samples]`` and each sample's ``reward``.

        Raises:
            RewardError: when run, if a reward raises or is not a finite number; the message names the sample.
        """

        def run(batch: Batch) -> None:
            rewards = self.reward(batch.samples)
            for sample, value in zip(batch.samples, rewards, strict=True):
                sample.reward = value
            batch.sequences["rewards"] = torch.tensor(rewards, dtype=torch.float32)

        return Stage("reward.score", run, reads=("samples",), writes=("rewards",), place=self.reward.place)
