"""The compiled half of the operations: the installed library, or one built on first use and cached.

`load_cpu()` and `load_cuda()` make `torch.ops.megatron_rl_cpu` and `torch.ops.megatron_rl_cuda` exist, or raise
`UnavailableError` with the reason. A build is cached under a hash of its sources, compiler, flags and torch version;
ranks that start together wait on a file lock, so that one of them compiles and the others load.

Not `torch.utils.cpp_extension.load`: its lock file outlives a killed rank and is then waited for without end, and ranks
that waited for a failed compilation get no compiler error (docs/adding_things.md has the comparison).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.ops.selection import UnavailableError

logger = logging.getLogger(__name__)

BUILD_SECONDS = 600.0
PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in a checkout; inside it where setup.py installed it.
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"


@dataclass(frozen=True)
class Build:
    """One shared library.

    Attributes:
        name: of the library, "ops_cpu"; an installed one is `megatron_rl/_<name>*.so`.
        compiler: absolute path.
        flags: everything but sources and output.
        sources: translation units, sorted.
    """

    name: str
    compiler: str
    flags: tuple[str, ...]
    sources: tuple[Path, ...]

    def command(self, output: Path) -> list[str]:
        return [self.compiler, *map(str, self.sources), *self.flags, "-o", str(output)]

    def key(self) -> str:
        """Hash of all that decides the binary; the compiler by its file, as asking its version costs a process."""
        digest = hashlib.sha256(repr((self.flags, torch.__version__)).encode())
        compiler = Path(self.compiler).resolve()
        digest.update(f"{compiler} {compiler.stat().st_size} {compiler.stat().st_mtime_ns}".encode())
        for path in (*self.sources, *sorted(SOURCES.rglob("*.h"))):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:20]


def cpu_build() -> Build:
    """The CPU operations: any C++17 compiler, OpenMP, torch's stable ABI."""
    return Build("ops_cpu", _compiler("CXX", ("g++", "c++", "clang++")), cpu_flags(), _sources("cpu/*.cpp", "cpu_ops"))


def cpu_flags() -> tuple[str, ...]:
    """Compiler and linker flags of the CPU operations."""
    # No contraction: a fused multiply-add would round differently from the reference. Conversions have no traps or
    # errno to preserve, and saying so lets their loops be vectorised.
    maths = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
    return ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", *maths, *_include_flags("cpu"), *_torch_libraries())


def cuda_build(*architectures: str) -> Build:
    """The CUDA operations for some architectures ("90" for sm_90), and as PTX of the last for later ones."""
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    flags = ("-O3", "-std=c++17", "-shared", "-DUSE_CUDA", "-Xcompiler=-fPIC", *codes, *_include_flags("kernels"))
    return Build(
        "ops_cuda",
        _compiler("NVCC", ("nvcc", "/usr/local/cuda/bin/nvcc")),
        (*flags, *_torch_libraries("torch_cuda")),
        _sources("kernels/*.cu", "cuda_ops"),
    )


def _include_flags(folder: str) -> tuple[str, ...]:
    root = Path(torch.__file__).parent / "include"
    return (f"-I{SOURCES / 'include'}", f"-I{SOURCES / folder}", "-isystem", str(root))


def _torch_libraries(*names: str) -> tuple[str, ...]:
    return (f"-L{Path(torch.__file__).parent / 'lib'}", *(f"-l{name}" for name in ("torch_cpu", *names)))


def _sources(pattern: str, registration: str) -> tuple[Path, ...]:
    if not SOURCES.is_dir():
        raise UnavailableError(f"no compiled library in {PACKAGE} and no sources in {SOURCES} to build it from")
    return (*sorted(SOURCES.glob(pattern)), SOURCES / "torch" / f"{registration}.cpp")


def _compiler(variable: str, names: tuple[str, ...]) -> str:
    for name in (os.environ.get(variable, ""), *names):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise UnavailableError(
        f"no compiler: none of {', '.join(names)} is on PATH. Install one, or set ${variable} to its path"
    )


def requires_cpu(device_type: str) -> None:
    """The `requires` of every C++ implementation: CPU tensors, and a compiled library."""
    if device_type != "cpu":
        raise UnavailableError(f"it runs on CPU tensors only, not on {device_type}")
    load_cpu()


def requires_cuda(device_type: str) -> None:
    """The `requires` of every CUDA implementation: CUDA tensors, and a compiled library."""
    if device_type != "cuda":
        raise UnavailableError(f"it runs on CUDA tensors only, not on {device_type}")
    load_cuda()


@functools.cache
def load_cpu() -> None:
    """Make `torch.ops.megatron_rl_cpu` exist.

    Raises:
        UnavailableError: no library is installed and none can be built; the reason is the message.
    """
    _load(_installed("ops_cpu") or built(cpu_build()))


@functools.cache
def load_cuda() -> None:
    """Make `torch.ops.megatron_rl_cuda` exist for the current GPU; raises like `load_cpu`."""
    if not torch.cuda.is_available():
        raise UnavailableError("torch sees no CUDA device")
    library = _installed("ops_cuda")
    if library is None:
        major, minor = torch.cuda.get_device_capability()
        library = built(cuda_build(f"{major}{minor}"))
    _load(library)


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise UnavailableError(f"{library} does not load: {error}") from error


def _installed(name: str) -> Path | None:
    if SOURCES.is_dir() and SOURCES.parent != PACKAGE:
        return None  # a checkout: its sources may be newer than any library that lies in the tree
    return next(iter(sorted(PACKAGE.glob(f"_{name}*.so"))), None)


def cache_folder() -> Path:
    """Where built libraries live: $MEGATRON_RL_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MEGATRON_RL_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_rl"


def built(build: Build, timeout: float = BUILD_SECONDS) -> Path:
    """The cached library of ``build``, compiled now if this is its first use.

    Raises:
        UnavailableError: the compiler failed, or ``timeout`` seconds passed here or in the rank that compiles.
    """
    library = cache_folder() / f"{build.name}-{build.key()}.so"
    if library.exists():
        return library
    deadline = time.monotonic() + timeout
    arrival = time.time()
    library.parent.mkdir(parents=True, exist_ok=True)
    failure = library.with_suffix(".failed")
    with _locked(library.with_suffix(".lock"), deadline):
        if library.exists():
            return library
        if failure.exists() and failure.stat().st_mtime >= arrival:  # a rank that started with this one has tried
            raise UnavailableError(failure.read_text())
        try:
            _compile(build, library, deadline)
        except UnavailableError as reason:
            failure.write_text(str(reason))
            raise
    return library


@contextlib.contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold an flock, which the operating system releases when the process dies: a killed rank blocks nobody."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UnavailableError(f"another process is still building after the time limit ({path})") from None
                time.sleep(0.05)
            except OSError as error:
                # Lustre and NFS can be mounted without locks. Each rank then compiles, and renames a complete library.
                logger.warning("no file lock in %s (%s): every rank compiles its own", path.parent, error)
                break
        yield


def _compile(build: Build, library: Path, deadline: float) -> None:
    # On a shared file system two nodes can have the same process id.
    partial = library.with_suffix(f".{socket.gethostname()}.{os.getpid()}.partial")
    start = time.monotonic()
    try:
        result = subprocess.run(
            build.command(partial), capture_output=True, text=True, timeout=max(1.0, deadline - start), check=False
        )
        if result.returncode:
            raise UnavailableError(f"{build.compiler} failed: {result.stderr.strip()[:800]}")
        os.replace(partial, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"building {build.name} failed: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    logger.info("built %s in %.1f s: %s", build.name, time.monotonic() - start, library)
