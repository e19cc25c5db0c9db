"""Checksums as an SGLang server's /weights_checker computes them, of tensors in this process.

`sglang.srt.managers.mm_utils.tensor_hash`: of a CUDA tensor a 64-bit hash of its 32-bit words, by a Triton kernel
(`sglang.kernels.ops.memory.gpu_tensor_hash`, the same in 0.5.21 to 0.5.23); of any other the first bytes of SHA-256.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
POSITIONS = ((0x27D4EB2D, 15), (0x165667B1, 13))  # what a word's position is multiplied with, and rotated by
MIX = (0x85EBCA6B, 0xC2B2AE35)  # of the 32-bit finaliser of MurmurHash3
TILE = 8192  # words that are added up before they are mixed again
CPU_TILES, DEVICE_TILES = 4, 64  # hashed at a time: a few times 32 KiB each of extra memory
LOW32, LOW64 = (1 << 32) - 1, (1 << 64) - 1


def server_checksum(tensor: Tensor, device: str) -> str:
    """The checksum of a parameter with the values of ``tensor`` on a server that runs on ``device`` ("cuda", "cpu")."""
    return f"{cuda_hash(tensor):016x}" if device == "cuda" else _sha256(tensor)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_flat_bytes(tensor).cpu().numpy().data).hexdigest()[:16]


def cuda_hash(tensor: Tensor) -> int:
    """`gpu_tensor_hash`, in torch operations on the device of ``tensor``."""
    content = _flat_bytes(tensor)
    padding = -content.numel() % 4
    if padding:
        content = torch.cat([content, content.new_zeros(padding)])
    words = content.view(torch.int32)
    if not words.numel():
        return 0
    step = TILE * (CPU_TILES if tensor.device.type == "cpu" else DEVICE_TILES)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), step):
        total += _tiles(words[start : start + step], start, words.numel() * 4)
    return _splitmix64(int(total) & LOW64)


def _tiles(words: Tensor, start: int, num_bytes: int) -> Tensor:
    """The sum of the hashes of the tiles in ``words``, the first of which has position ``start``."""
    position = torch.arange(start, start + words.numel(), dtype=torch.int64, device=words.device).to(torch.int32)
    halves = []
    for seed, (factor, turns) in zip(SEEDS, POSITIONS, strict=True):
        key = (position * _signed(factor)).add_(_signed(seed))
        key ^= (position << turns) | _shifted(position, 32 - turns)
        key ^= words
        mixed = _mixed(key)
        whole = mixed[: mixed.numel() // TILE * TILE].view(-1, TILE).sum(1)
        rest = mixed[whole.numel() * TILE :]
        sums = torch.cat([whole, rest.sum().view(1)]) if rest.numel() else whole
        halves.append(_mixed((sums ^ num_bytes).to(torch.int32)).to(torch.int64) & LOW32)
    return ((halves[0] << 32) | halves[1]).sum()


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in place; 32-bit integers wrap around as unsigned ones do."""
    x ^= _shifted(x, 16)
    x *= _signed(MIX[0])
    x ^= _shifted(x, 13)
    x *= _signed(MIX[1])
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, as if ``x`` had no sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _splitmix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & LOW64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & LOW64
    return x ^ (x >> 31)


def _flat_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
