"""State of a job in Megatron-Core's distributed checkpoint format."""
