"""Where tests marked gpu run: on a GPU; or, to rehearse them without one, on the CPU with MEGATRON_RL_REHEARSE_GPU=1.

A rehearsal (`test_gpu_rehearsal.py`) proves that the tests themselves are right, and nothing about a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("MEGATRON_RL_REHEARSE_GPU") == "1" and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

only_on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not REHEARSAL, reason="no CUDA device: only a GPU can tell"),
]
