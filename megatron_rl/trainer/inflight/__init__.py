"""Rollouts in flight: groups between sampling and training, and the journal that keeps them."""
