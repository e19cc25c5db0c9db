"""What SGLang servers import of ours: this folder is on their PYTHONPATH. Nothing here imports megatron_rl."""
