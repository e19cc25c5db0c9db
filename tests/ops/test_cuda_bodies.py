"""The CUDA kernels without a GPU: their bodies run on the host, and nvcc compiles them for three architectures."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.emulation import CSRC, KERNELS, EmulatedOps, compile_on_host, host_compiler
from ops.op_cases import FLOATS, assert_bitwise_equal, copy_case, copy_tensors, random_bits

from megatron_rl.ops import accumulate as accumulate_op
from megatron_rl.ops import block_quantize as quantize_op
from megatron_rl.ops import copy_spans as copy_op
from megatron_rl.ops import span_checksum as checksum_op
from megatron_rl.ops.accumulate import cuda as accumulate_cuda
from megatron_rl.ops.block_quantize import cuda as quantize_cuda
from megatron_rl.ops.copy_spans import cuda as copy_cuda
from megatron_rl.ops.span_checksum import cuda as checksum_cuda
from megatron_rl.ops.span_checksum.interface import _in_words

PAIRS = [(a, b) for a in FLOATS for b in FLOATS if a != b]
PAIRS += [(raw, raw) for raw in (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedOps:
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_on_host([CSRC / "kernels" / f"{name}.cu" for name in KERNELS], library, "-shared", "-fPIC")
    return EmulatedOps(library)


@pytest.fixture(scope="module")
def on_host(emulated: EmulatedOps) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        put_in_place(emulated, patch)
        yield


def put_in_place(ops: EmulatedOps, patch: pytest.MonkeyPatch) -> None:
    for module in (copy_cuda, quantize_cuda, checksum_cuda, accumulate_cuda):
        patch.setattr(module, "OPS", ops)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough for small inputs to need several, in both directions."""
    monkeypatch.setattr(copy_cuda, "TILE_ELEMENTS", 300)
    monkeypatch.setattr(checksum_cuda, "TILE_ELEMENTS", 24 * 90)
    monkeypatch.setattr(checksum_cuda, "TILE_COLS", 24)


def check_copy(pair: tuple[torch.dtype, torch.dtype], case: tuple, shift: int) -> None:
    jobs, src_sizes, dst_sizes, seed = case
    generator = torch.Generator().manual_seed(seed)
    sources = copy_tensors(src_sizes, pair[0], generator, shift)
    expected = copy_tensors(dst_sizes, pair[1], generator)
    actual = [tensor.clone() for tensor in expected]
    copy_op.copy_spans(sources, expected, torch.tensor(jobs), implementation="reference")
    copy_cuda.copy_spans(sources, actual, torch.tensor(jobs))
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, b)


def check_quantize(rows: int, cols: int, dtype: torch.dtype, seed: int, wild: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random_bits(rows * cols, dtype, generator) if wild else torch.randn(rows * cols, generator=generator).to(dtype)
    x = x.view(rows, cols)
    expected = quantize_op.block_quantize(x, implementation="reference")
    actual = quantize_cuda.block_quantize(x)
    assert_bitwise_equal(actual[1], expected[1])
    assert_bitwise_equal(actual[0], expected[0])


def check_checksum(rows: int, cols: int, dtype: torch.dtype, as_dtype: torch.dtype | None, seed: int) -> None:
    pad = seed % 3 * 8
    matrix = random_bits(rows * (cols + pad) + 1, dtype, torch.Generator().manual_seed(seed))[seed % 2 :]
    half = cols // 2
    spans = torch.tensor(
        [[0, 1, 99, 0, 5, 0, rows, half, cols + pad], [0, 0, 98, 3, 1, half, rows, cols - half, cols + pad]]
    )
    expected = checksum_op.span_checksum(
        [matrix], spans, 2, as_dtype=as_dtype, implementation="reference", checked=False
    )
    tensors = [matrix]
    if as_dtype is None or as_dtype == dtype:
        (tensors, spans), as_dtype = _in_words(tensors, spans), None
    assert checksum_cuda.span_checksum(tensors, spans, 2, as_dtype).tolist() == expected.tolist()


def check_accumulate(
    num_parts: int, elements: int, dtypes: tuple[torch.dtype, torch.dtype], shift: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.arange(num_parts)  # the order of unequal numbers shows in the last bits
    whole = [torch.randn(elements + shift, generator=generator) * scale[i] for i in range(num_parts)]
    parts = [part.to(dtypes[0])[shift:] for part in whole]
    for part in parts:
        part[0] = -0.0  # a sum that starts from +0 loses the sign
    expected, actual = torch.empty(elements, dtype=dtypes[1]), torch.zeros(elements + shift, dtype=dtypes[1])
    accumulate_op.accumulate(parts, expected, implementation="reference")
    accumulate_cuda.accumulate(parts, actual[shift:])
    assert_bitwise_equal(actual[shift:], expected)
    assert not actual[:shift].any()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@given(case=copy_case(largest=200), shift=st.integers(0, 3))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_copy_spans_body_agrees_with_the_reference(on_host, pair, case, shift):
    check_copy(pair, case, shift)


@given(
    rows=st.integers(1, 200), cols=st.integers(1, 200), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**31),
    wild=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None, derandomize=True)
def test_block_quantize_body_agrees_with_the_reference(on_host, rows, cols, dtype, seed, wild):
    check_quantize(rows, cols, dtype, seed, wild)


@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 90),
    dtype=st.sampled_from([*FLOATS, torch.float8_e4m3fn, torch.int64]),
    as_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_span_checksum_body_agrees_with_the_reference(on_host, rows, cols, dtype, as_dtype, seed):
    check_checksum(rows, cols, dtype, as_dtype if dtype in FLOATS else None, seed)


@given(
    num_parts=st.integers(1, 6),
    elements=st.integers(1, 6000),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    shift=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_accumulate_body_agrees_with_the_reference(on_host, num_parts, elements, dtypes, shift, seed):
    check_accumulate(num_parts, elements, dtypes, shift, seed)


def test_the_accumulate_body_may_write_to_one_of_its_parts(on_host):
    parts = [torch.full((3000,), value) for value in (1.0, 2.0, 4.0)]
    accumulate_cuda.accumulate(parts, parts[2])
    assert torch.equal(parts[2], torch.full((3000,), 7.0))


def test_tiles_larger_than_one_launch_block_are_covered(on_host):
    generator = torch.Generator().manual_seed(0)
    source, target = random_bits(41_000, torch.float32, generator), torch.zeros(41_000, dtype=torch.bfloat16)
    expected = target.clone()
    jobs = torch.tensor([[0, 0, 0, 0, 1, 30_001, 0, 0], [0, 0, 30_001, 30_001, 10, 999, 1100, 1000]])
    copy_cuda.copy_spans([source], [target], jobs)
    copy_op.copy_spans([source], [expected], jobs, implementation="reference")
    assert_bitwise_equal(target, expected)


def copies() -> None:
    """One job in whole packs, one aligned but with a ragged end, one unaligned with more elements than threads."""
    jobs = [(0, 0, 8, 0, 6, 64, 96, 72), (0, 0, 8, 432, 5, 19, 64, 24), (0, 0, 3, 561, 7, 43, 47, 44)]
    check_copy((torch.float32, torch.bfloat16), (jobs, [700], [900], 1), 0)


def checksums() -> None:
    for rows, cols, as_dtype in ((200, 64, None), (5, 61, None), (9, 40, torch.bfloat16)):
        check_checksum(rows, cols, torch.float32 if as_dtype else torch.bfloat16, as_dtype, 0)


def quantizations() -> None:
    for rows, cols, wild in ((130, 270, False), (40, 131, False), (9, 12, True)):
        check_quantize(rows, cols, torch.float32, 4, wild)


def sums() -> None:
    """Whole packs with a ragged end, and unaligned memory; more than one block."""
    for elements, shift in ((2053, 0), (3000, 1)):
        check_accumulate(3, elements, (torch.bfloat16, torch.float32), shift, 5)
        check_accumulate(2, elements, (torch.float32, torch.float32), shift, 6)


CHECKS: dict[str, Callable[[], None]] = {
    "copy_spans": copies,
    "block_quantize": quantizations,
    "span_checksum": checksums,
    "accumulate": sums,
}
MUTANTS = [  # file, code in it, what it becomes, and the kernel that must then fail
    ("copy_spans.cu", "tile.cols % kPack == 0 &&", "", "copy_spans"),
    ("copy_spans.cu", "(i - row * per_row) * N", "(i - row * per_row)", "copy_spans"),
    ("copy_spans.cu", "at.row * tile.dst_stride +", "", "copy_spans"),
    ("copy_spans.cu", "i < total; i += kThreads", "i < total && i < kThreads; i += kThreads", "copy_spans"),
    ("device.h", "value = reduce(value, partial[warp]);", "", "block_quantize"),
    ("device.h", "  __syncthreads();\n  value = partial[0];", "  value = partial[0];", "block_quantize"),
    ("device.h", "step = kWarp / 2", "step = kWarp / 4", "block_quantize"),
    ("block_quantize.cu", "if (col + k < cols) in.v[k]", "if (col + k + 1 < cols) in.v[k]", "block_quantize"),
    ("block_quantize.cu", "blockIdx.y) * gridDim.x", "blockIdx.y) * gridDim.y", "block_quantize"),
    ("span_checksum.cu", "span.logical_row + tile.row)", "span.logical_row)", "span_checksum"),
    ("span_checksum.cu", "row += step)", "row += step + 1)", "span_checksum"),
    ("span_checksum.cu", "W>::of(at[k]) + 1)", "W>::of(at[k]))", "span_checksum"),
    ("span_checksum.cu", "tile.col + col + k", "col + k", "span_checksum"),
    ("accumulate.cu", "int64_t p = 0; p < num_parts", "int64_t p = 0; p + 1 < num_parts", "accumulate"),
    ("accumulate.cu", "p == 0 ? Cast<float>::from(in.v[k]) :", "", "accumulate"),
    ("accumulate.cu", "at < first + kPack && at < n", "at + 1 < first + kPack && at < n", "accumulate"),
    ("accumulate.cu", "threadIdx.x) * kPack", "threadIdx.x) * 1", "accumulate"),
]


@pytest.mark.parametrize(("file", "code", "mutation", "kernel"), MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_a_mutated_kernel_is_found(file, code, mutation, kernel, small_tiles, tmp_path, monkeypatch):
    text = (CSRC / "kernels" / file).read_text()
    assert text.count(code) == 1, "the mutant must change exactly one place"
    for path in (CSRC / "kernels").iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / file).write_text(text.replace(code, mutation))
    compile_on_host([tmp_path / f"{kernel}.cu"], tmp_path / "mutant.so", "-shared", "-fPIC", "-O0", kernels=tmp_path)
    put_in_place(EmulatedOps(tmp_path / "mutant.so"), monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[kernel]()


def test_the_inputs_that_find_mutants_pass_on_the_unchanged_kernels(on_host, small_tiles):
    for check in CHECKS.values():
        check()


def test_the_bodies_never_touch_memory_outside_their_tensors(tmp_path: Path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over random tables in memory cut to the byte."""
    sources = [CSRC / "emul" / "address_check.cpp", *(CSRC / "kernels" / f"{name}.cu" for name in KERNELS)]
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compile_on_host(sources, tmp_path / "address_check", *flags)
    result = subprocess.run([tmp_path / "address_check"], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "clean\n"), result.stderr[-3000:]


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nvcc_compiles_without_spilling_registers(kernel: str, architecture: str, tmp_path: Path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA toolkit is not installed")
    command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    command += [f"-I{CSRC / 'include'}", str(CSRC / "kernels" / f"{kernel}.cu"), "-o", str(tmp_path / "kernel.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) >= 3, "ptxas reports every kernel"
    assert set(spills) == {("0", "0")}


def test_the_torch_registration_compiles_against_the_stable_abi():
    include = Path(torch.__file__).parent / "include"
    command = [host_compiler(), "-fsyntax-only", "-std=c++17", "-DUSE_CUDA", f"-I{CSRC / 'include'}"]
    command += [f"-I{CSRC / 'kernels'}", "-isystem", str(include), str(CSRC / "torch" / "cuda_ops.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
