"""The CUDA operations on the host: csrc/kernels/*.cu built by g++ with csrc/emul, behind the calls cuda.py makes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = ("copy_spans", "block_quantize", "span_checksum", "accumulate")


def host_compiler() -> str:
    """g++; skips the test where there is none."""
    path = shutil.which("g++")
    if path is None:
        pytest.skip("no g++: the kernel bodies cannot be built for the host")
    return path


def compile_on_host(sources: list[Path], output: Path, *flags: str, kernels: Path = CSRC / "kernels") -> None:
    """Build ``sources`` with the emulation in the place of the CUDA runtime; headers of ``kernels`` first."""
    includes = [f"-I{folder}" for folder in (kernels, CSRC / "kernels", CSRC / "include", CSRC / "emul")]
    command = [host_compiler(), "-x", "c++", "-std=c++17", "-O1", "-Wno-unknown-pragmas", *flags, *includes]
    result = subprocess.run(
        [*command, *map(str, sources), "-o", str(output)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class EmulatedOps:
    """Stands where `torch.ops.megatron_rl_cuda` stands in the cuda modules."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def copy_spans(
        self, sources: Tensor, destinations: Tensor, jobs: Tensor, tiles: Tensor, src: int, dst: int, element_bytes: int
    ) -> None:
        tables = map(_pointer, (sources, destinations, jobs, tiles))
        count = ctypes.c_int64(len(tiles))
        self._check(self._library.mrl_copy_spans(*tables, count, src, dst, element_bytes, None))

    def block_quantize(self, x: Tensor, codes: Tensor, scales: Tensor, number_type: int) -> None:
        shape = map(ctypes.c_int64, x.shape)
        self._check(
            self._library.mrl_block_quantize(_pointer(x), _pointer(codes), _pointer(scales), *shape, number_type, None)
        )

    def span_checksum(
        self, tensors: Tensor, spans: Tensor, tiles: Tensor, sums: Tensor, src: int, dst: int, word_bytes: int
    ) -> None:
        tables = map(_pointer, (tensors, spans, tiles))
        count = ctypes.c_int64(len(tiles))
        self._check(self._library.mrl_span_checksum(*tables, count, src, dst, word_bytes, _pointer(sums), None))

    def accumulate(self, parts: Tensor, out: Tensor, number_type: int, out_type: int, aligned: bool) -> None:
        count, elements, whole = ctypes.c_int64(len(parts)), ctypes.c_int64(out.numel()), ctypes.c_bool(aligned)
        tensors = _pointer(parts), count, _pointer(out), elements
        self._check(self._library.mrl_accumulate(*tensors, number_type, out_type, whole, None))

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise RuntimeError(f"launch failed: {error}")
