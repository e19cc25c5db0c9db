"""`PromptSeeds`: what each prompt's samples are drawn with.

A seed depends on the run, the call, the prompt and how often the global batch had it before, so the layout of training
and rollout changes no sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_rl.batch import Prompt
from megatron_rl.parallel import ParallelContext
from megatron_rl.rollout.base import sample_seed


class PromptSeeds:
    """The seeds of one run.

    Attributes:
        calls: of `training` so far: part of every seed.
    """

    def __init__(self, seed: int, context: ParallelContext) -> None:
        self._run, self._context = seed, context
        self.calls = 0

    def training(self, prompts: Sequence[Prompt]) -> list[int]:
        """The seed of each prompt of this step; collective over all ranks. Seeds differ within the global batch, also
        where it holds a row several times.

        Args:
            prompts: this data-parallel rank's part of the global batch; the parts end to end, in the order of the
                ranks, are the batch.
        """
        call, own = self.calls, [prompt.index for prompt in prompts]
        self.calls += 1
        context = self._context
        parts = dict(context.gather_objects((context.coordinates.dp, own))) if context.dp_size > 1 else {}
        before = [index for dp in range(context.coordinates.dp) for index in parts[dp]]
        seen: Counter[int] = Counter(before)
        return [self._seed(call, index, seen) for index in own]

    def evaluation(self, prompts: Sequence[Prompt]) -> list[int]:
        """Seeds that are the same in every evaluation; they do not change the training seeds."""
        seen: Counter[int] = Counter()
        return [self._seed(-1, prompt.index, seen) for prompt in prompts]

    def _seed(self, call: int, index: int, seen: Counter[int]) -> int:
        """The next seed of prompt ``index``; ``seen`` counts its earlier occurrences."""
        seed, earlier = sample_seed(self._run, call, index), seen[index]
        seen[index] += 1
        return sample_seed(seed, earlier, index) if earlier else seed
