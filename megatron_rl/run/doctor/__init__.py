"""`megatron-rl doctor`: one update on small random data, on many layouts, compared quantity by quantity."""
