"""What only a fresh process can show: import order, a visible accelerator, and the user's torch left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def python(program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


def output(program: str) -> str:
    done = python(program)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    output("import sys, megatron_rl; assert 'torch' not in sys.modules and 'Actor' in dir(megatron_rl)")


def test_nothing_changes_where_an_accelerator_is_visible() -> None:
    output(
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "before = list(sys.meta_path)\n"
        "import megatron_rl\n"
        "assert megatron_rl.install_cpu_face() is False\n"
        "assert sys.meta_path == before, sys.meta_path\n"
        "torch.cuda.is_available = lambda: False\n"  # the import below must not look for a driver
        "import megatron.core.jit, megatron.core.parallel_state as state\n"
        "assert megatron.core.jit.jit_fuser is torch.compile\n"
        "assert '__torch_cuda__' not in vars(state)\n"
        "assert not any(m.startswith('megatron_rl.devices.cpu_face.torch_cuda') for m in sys.modules)\n"
    )


def test_an_accelerator_seen_only_after_installation_makes_the_face_leave() -> None:
    output(
        "import sys, importlib.util, megatron_rl, torch\n"
        "assert 'CpuFaceFinder' in type(sys.meta_path[0]).__name__\n"
        "torch.cuda.is_available = lambda: True\n"
        "spec = importlib.util.find_spec('megatron.core')\n"
        "assert 'CpuFace' not in type(spec.loader).__name__\n"
        "assert not any('CpuFace' in type(finder).__name__ for finder in sys.meta_path)\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="late installation is only an error on CPU")
def test_importing_the_package_after_megatron_core_is_a_clear_error() -> None:
    done = python("import sys, types, torch; sys.modules['megatron.core'] = types.ModuleType('m'); import megatron_rl")
    assert done.returncode == 1
    assert "RuntimeError: megatron.core was imported before megatron_rl" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU face does nothing where a GPU is visible")
def test_the_users_torch_and_the_shared_bytecode_stay_as_they_were() -> None:
    stderr = output(
        "import importlib.util, pathlib, torch, warnings\n"
        "folder = pathlib.Path(importlib.util.find_spec('megatron').submodule_search_locations[0]) / 'core'\n"
        "def names():\n"
        "    owners = [torch, torch.Tensor, torch.cuda, torch.cuda.random, torch.distributed, torch.nn.Module]\n"
        "    return [(owner, name, value) for owner in owners for name, value in vars(owner).items()]\n"
        "def bytecode():\n"
        "    files = [folder / 'parallel_state.py', folder / 'tensor_parallel/random.py']\n"
        "    cached = [pathlib.Path(importlib.util.cache_from_source(file)) for file in files]\n"
        "    return [file.read_bytes() if file.exists() else None for file in cached]\n"
        "before, code = names(), bytecode()\n"
        "import megatron_rl\n"
        "from megatron.core import parallel_state\n"
        "from megatron.core.models.gpt.gpt_model import GPTModel\n"
        "from megatron.core.optimizer import get_megatron_optimizer\n"
        "assert '__torch_cuda__' in vars(parallel_state)\n"
        "changed = [(o, n) for o, n, value in before if vars(o).get(n) is not value and not n.startswith('__')]\n"
        "assert not changed, changed\n"
        "assert bytecode() == code\n"
        "try:\n"
        "    torch.zeros(1, device='cuda')\n"
        "    raise SystemExit('a tensor was made on a GPU that is not there')\n"
        "except (AssertionError, RuntimeError): pass\n"
        "warnings.warn('Apex is not installed. And this is my own news')\n"
    )
    assert "Falling back" not in stderr
    assert "this is my own news" in stderr
