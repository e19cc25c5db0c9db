"""A checksum of logical tensors that shards can be summed into, whatever the layout."""

from megatron_rl.ops.span_checksum.interface import SPAN_COLUMNS, span_checksum, tensor_key

__all__ = ["SPAN_COLUMNS", "span_checksum", "tensor_key"]
