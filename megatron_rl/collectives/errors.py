"""What a collective of this room raises."""

from __future__ import annotations


class CollectiveError(RuntimeError):
    """A collective failed on all ranks: no path is left, or a rank is gone. Its result must not be used."""
