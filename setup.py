"""Packaging of megatron_rl.

A plain ``pip install .`` is pure Python and works everywhere; compiled parts of csrc come in by `native_extensions`.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

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
]

MLFLOW = ["mlflow>=3.0"]
TENSORBOARD = ["tensorboard>=2.15"]
WANDB = ["wandb>=0.17"]
EXTRAS = {
    "mlflow": MLFLOW,
    "tensorboard": TENSORBOARD,
    "wandb": WANDB,
    "tracking": MLFLOW + TENSORBOARD + WANDB,
    "sglang": ["sglang>=0.5.0,<0.6"],
    "dev": [*MLFLOW, *TENSORBOARD, "pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13"],
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
    """Compiled parts to build at installation; without them the operations are built on first use."""
    return []


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
    package_data={"megatron_rl": ["py.typed"]},
    include_package_data=True,
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
    ext_modules=native_extensions(),
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
