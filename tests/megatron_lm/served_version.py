"""Whether a rollout engine serves the newest weights, as one rank alone can see it."""

from __future__ import annotations

from megatron_rl.workers import Actor


def is_current(actor: Actor) -> bool:
    """False also where something else than `Actor.optimize` has changed this rank's part of the weights."""
    rollouts = actor.rollouts
    return rollouts._served_version == rollouts.trained_version and not rollouts._changed()
