"""The FSDP2 backend: the Hugging Face module itself under PyTorch's ``fully_shard``, for models without a family."""
