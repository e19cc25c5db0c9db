"""`KVCache`: keys and values of the running sequences, one row of fixed length each, under a bound on bytes.

Running sequences always fill rows ``[0, running)``, so that a decode step works on plain slices without copies.
"""

from __future__ import annotations

import torch


class KVCache:
    """Storage ``[layers, rows, kv_heads, 2, length, head_dim]``, kept from call to call.

    Args:
        num_layers, kv_heads, head_dim: of this rank's part of the model.
        max_bytes: upper bound of the storage.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers, self.kv_heads, self.head_dim = num_layers, kv_heads, head_dim
        self.max_bytes, self.dtype, self.device = max_bytes, dtype, device
        self._storage = torch.empty(0, dtype=dtype, device=device)
        self.layers: tuple[torch.Tensor, ...] = ()

    def row_bytes(self, length: int) -> int:
        """Bytes of one sequence of ``length`` tokens."""
        return self.num_layers * self.kv_heads * 2 * length * self.head_dim * self.dtype.itemsize

    def rows(self, length: int) -> int:
        """How many sequences of ``length`` tokens fit.

        Raises:
            ValueError: not even one.
        """
        rows = self.max_bytes // self.row_bytes(length)
        if not rows:
            raise ValueError(
                f"one sequence of {length} tokens needs {self.row_bytes(length):,} bytes of KV cache, but "
                f"kv_cache_bytes is {self.max_bytes:,}: raise it, or lower max_tokens"
            )
        return rows

    def reserve(self, rows: int, length: int) -> None:
        """Lay the storage out for ``rows`` sequences of up to ``length`` tokens, and clear it: masked scores are
        still multiplied, so a stale NaN would poison a healthy sequence."""
        shape = (self.num_layers, rows, self.kv_heads, 2, length, self.head_dim)
        numel = rows * self.row_bytes(length) // self.dtype.itemsize
        if self._storage.numel() < numel:
            self.release()
            self._storage = torch.empty(numel, dtype=self.dtype, device=self.device)
        self.layers = self._storage[:numel].zero_().view(shape).unbind(0)

    def write_prompts(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, sources: torch.Tensor, first_row: int
    ) -> None:
        """Give sequence ``first_row + i`` the prompt ``sources[i]``.

        Args:
            keys, values: ``[prompts, length, kv_heads, head_dim]``.
            sources: ``[sequences]``; samples of one prompt share its row.
        """
        rows = self.layers[layer][first_row : first_row + len(sources), :, :, : keys.shape[1]]
        rows[:, :, 0] = keys.transpose(1, 2)[sources]
        rows[:, :, 1] = values.transpose(1, 2)[sources]

    def move(self, targets: torch.Tensor, sources: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` positions of rows ``sources`` over rows ``targets``."""
        for layer in self.layers:
            layer[targets, :, :, :length] = layer[sources, :, :, :length]

    def release(self) -> None:
        """Give the storage back."""
        self.layers = ()
        self._storage = torch.empty(0, dtype=self.dtype, device=self.device)
