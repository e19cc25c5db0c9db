"""The components that decoders are composed of: numbers, Hugging Face names and parameters of each, as data.

A component says what it is and how its tensors are placed (`models/parameters.py`); it computes nothing. The Megatron
builder and the local rollout engine interpret it.
"""
