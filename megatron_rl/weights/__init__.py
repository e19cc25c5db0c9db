"""Weights in and out: Hugging Face folders and models, checkpoints, and the push into rollout engines."""
