"""Rollouts in flight: rollout ranks that sample while others train, and the journal that keeps finished groups."""
