"""Packaging of megatron_rl.

A plain ``pip install .`` is pure Python and works everywhere; compiled parts of csrc come in by `native_extensions`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# megatron-core up to 0.16 runs on Python 3.11; from 0.17 on it needs 3.12 and Triton, which it does not declare, as it
# does not declare psutil (saving a checkpoint without it hangs) and einops.
REQUIREMENTS = [
    "torch>=2.8",
    "megatron-core>=0.16.1,<0.20",
    "triton>=3.2; python_version >= '3.12' and platform_system == 'Linux'",
    "psutil",
    "einops",
    "numpy>=1.26",
    "transformers>=5.0,<6",
    "safetensors>=0.5",
    "jinja2>=3.1",
    "datasets>=3.0",
    "pyarrow>=15",
    "pydantic>=2.7,<3",
    "omegaconf>=2.3",
    "pyyaml>=6",
    "typer>=0.12",
    "rich>=13",
    "httpx>=0.27",
    "tenacity>=8.2",
    "math-verify>=0.8",
    "matplotlib>=3.8",
    "xxhash>=3.0",
]

MLFLOW = ["mlflow>=3.0"]
TENSORBOARD = ["tensorboard>=2.15"]
WANDB = ["wandb>=0.17"]
AGENTS = ["starlette>=0.40", "uvicorn>=0.30"]
EXTRAS = {
    "mlflow": MLFLOW,
    "tensorboard": TENSORBOARD,
    "wandb": WANDB,
    "tracking": MLFLOW + TENSORBOARD + WANDB,
    "sglang": ["sglang>=0.5.21,<0.6"],
    "agents": AGENTS,
    "reasoning-gym": ["reasoning-gym>=0.1.23"],
    "verifiers": [*AGENTS, "verifiers>=0.4,<0.5"],
    "dev": [
        *MLFLOW,
        *TENSORBOARD,
        *AGENTS,
        "openai>=2",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.13",
    ],
}


def version() -> str:
    """The version that the package states, read without importing it."""
    text = (ROOT / "megatron_rl" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found is not None, "megatron_rl/__init__.py states no __version__"
    return found.group(1)


def description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


def native_extensions() -> list[Extension]:
    """Compiled operations to build now: CPU always, CUDA when nvcc and a CUDA build of torch are found.

    None where the building environment has no torch (pip's isolated builds): they are then built on first use, from
    the csrc folder that is installed with the package. `pip install --no-build-isolation .` builds them now.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    names = ["cpu"] + (["cuda"] if torch.version.cuda and shutil.which("nvcc") else [])
    return [Extension(f"megatron_rl._ops_{name}", sources=[], optional=True) for name in names]


class BuildOperations(build_ext):
    """Runs the compiler command of `megatron_rl.ops.extension`, the one that first use runs too.

    An editable install leaves it to first use, which sees when a source changes; a library in the tree would not.
    """

    def build_extension(self, ext: Extension) -> None:
        if self.inplace or self.editable_mode:
            return
        sys.path.insert(0, str(ROOT))
        from megatron_rl.ops.extension import cpu_build, cuda_build
        from megatron_rl.ops.selection import UnavailableError

        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            build = cpu_build() if ext.name.endswith("_cpu") else cuda_build("80", "90", "100")
            subprocess.run(build.command(output), check=True)
        except (UnavailableError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} is left to its first use: {error}") from error


class BuildPackage(build_py):
    """Installs csrc inside the package, so that operations can be built on first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "megatron_rl" / "csrc", dirs_exist_ok=True)


setup(
    name="megatron-rl",
    version=version(),
    description="Reinforcement learning for the Megatron-Core job you already run",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rl", "megatron_rl.*"]),
    package_data={
        "megatron_rl": ["py.typed"],
        "megatron_rl.rollout.sglang": ["cpu_shim/*.py", "cpu_shim/sgl_kernel/*.py"],
    },
    include_package_data=True,
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildOperations, "build_py": BuildPackage},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
