"""A Megatron-Core model: how it is built, what its layers are made of, and what is done to its chunks."""
