"""The Megatron-Core backend: model chunks under Megatron's own pipeline schedule, data parallelism and optimizers."""
