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

    def write_prompts(self, layer: int, kv: torch.Tensor, sources: torch.Tensor, first_row: int) -> None:
        """Give sequence ``first_row + i`` the prompt ``sources[i]``.

        Args:
            kv: ``[prompts, length, 2, kv_heads, head_dim]``.
            sources: ``[sequences]``; samples of one prompt share its row.
        """
        rows = kv.permute(0, 3, 2, 1, 4)[sources]
        self.layers[layer][first_row : first_row + len(sources), :, :, : kv.shape[1]] = rows

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the keys and values of one token per running sequence go, for `write_tokens` of every layer.

        Args:
            positions: ``[running]``, where in its sequence each token stands.
        """
        length = self.layers[0].shape[3]
        heads = torch.arange(len(positions) * self.kv_heads * 2, device=positions.device) * length
        return (heads.view(len(positions), -1) + positions[:, None]).flatten()

    def write_tokens(self, layer: int, kv: torch.Tensor, places: torch.Tensor) -> None:
        """One more token of every running sequence.

        Args:
            kv: ``[running, 2, kv_heads, head_dim]``.
            places: from `places`.
        """
        vectors = kv.transpose(1, 2).reshape(-1, self.head_dim)
        self.layers[layer].view(-1, self.head_dim).index_copy_(0, places, vectors)

    def read(self, layer: int, running: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[running, kv_heads, length, head_dim]``, views."""
        rows = self.layers[layer][:running, :, :, :length]
        return rows[:, :, 0], rows[:, :, 1]

    def move(self, targets: torch.Tensor, sources: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` positions of rows ``sources`` over rows ``targets``."""
        for layer in self.layers:
            layer[targets, :, :, :length] = layer[sources, :, :, :length]

    def release(self) -> None:
        """Give the storage back."""
        self.layers = ()
        self._storage = torch.empty(0, dtype=self.dtype, device=self.device)
