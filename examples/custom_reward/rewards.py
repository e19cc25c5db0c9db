"""Rewards of your own: a function, a function of the whole batch, and a class with options."""

from collections import Counter

from megatron_rl.config import ConfigRecord
from megatron_rl.rewards import Reward


def names_hero(sample) -> float:
    """1 when the response names the prompt's answer; ``sample`` also has token ids, finish_reason and metadata."""
    return float(str(sample.prompt.answer) in sample.response_text)


def unlike_the_others(samples) -> list[float]:
    """Of the whole batch: the share of a response's words that no other response has."""
    seen = Counter(word for s in samples for word in set(s.response_text.split()))
    words = [set(s.response_text.split()) for s in samples]
    return [sum(seen[word] == 1 for word in own) / max(1, len(own)) for own in words]


class Brevity(Reward):
    """1 for an empty response, falling to 0 at ``longest`` tokens."""

    class Config(ConfigRecord):
        """What `options` in the YAML may say; an unknown key is an error."""

        longest: int = 100
        """Tokens at which nothing is left of the reward."""

    name = "brevity"

    def __init__(self, **options) -> None:
        self.config = self.Config.parse(options, where="options of brevity")

    def score_one(self, sample) -> float:
        return max(0.0, 1.0 - len(sample.response_ids) / self.config.longest)
