"""What flows through training: `Prompt`, `Sample`, and `Batch` (named, packed tensors)."""

from megatron_rl.batch.batch import Batch
from megatron_rl.batch.sample import Prompt, Sample

__all__ = ["Batch", "Prompt", "Sample"]
