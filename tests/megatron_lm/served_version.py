"""Whether a rollout engine serves the newest weights, as one rank alone can see it."""

from __future__ import annotations

from megatron_rl.workers import Actor


def is_current(actor: Actor) -> bool:
    """False also where something else than `Actor.optimize` has changed this rank's part of the weights."""
    weights = actor.rollouts.weights
    return weights._served_version == weights.trained_version and not weights._changed()
