"""The ways of weights into SGLang servers; each file says how it carries them.

`sharded`: each rank's own shards. `full`, `disk`, `broadcast`: whole Hugging Face tensors, over HTTP, through a folder
and over a process group. `base` is what they share, `wire` how tensors are written down, `checksums` and `proof`
whether the servers hold them, `server_layout` whether they may be written at all.
"""

from megatron_rl.rollout.sglang.weight_transfer import broadcast, disk, full, sharded  # noqa: F401  each registers itself
from megatron_rl.rollout.sglang.weight_transfer.base import TRANSFERS, WeightTransfer
from megatron_rl.rollout.sglang.weight_transfer.proof import RankSums, server_checksums
from megatron_rl.rollout.sglang.weight_transfer.server_layout import ServerLayout

__all__ = ["TRANSFERS", "RankSums", "ServerLayout", "WeightTransfer", "server_checksums"]
