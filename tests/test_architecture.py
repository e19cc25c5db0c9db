"""The architecture, enforced: this project breaks no rule, and every rule is shown to bite on a small broken tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_rules import RULES, layer_violations
from conftest import ROOT


def tree(root: Path, **files: str) -> Path:
    """Write ``files`` (path with __ for /, content) below ``root``; every package file gets a docstring."""
    for name, content in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Doc."""\n{content}')
    return root


@pytest.mark.parametrize("rule", RULES)
def test_project_obeys(rule: str) -> None:
    assert RULES[rule](ROOT) == []


# (rule, path without suffix, content, part of the violation)
BROKEN = {
    "up": ("layers", "megatron_rl__reshard__plan", "from megatron_rl.weights import sync", "imports up from weights"),
    "up by relative import": (
        "layers",
        "megatron_rl__ops__gae",
        "from ..workers.actor import Actor",
        "up from workers",
    ),
    "up inside a function": (
        "layers",
        "megatron_rl__batch__x",
        "def f():\n    import megatron_rl.trainer.loop",
        "up from",
    ),
    "up under TYPE_CHECKING": (
        "layers",
        "megatron_rl__data__prompts",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_rl.algorithms import GRPO",
        "up from algorithms",
    ),
    "up by package import": ("layers", "megatron_rl__registry", "from megatron_rl import cli", "up from cli"),
    "sideways": ("layers", "megatron_rl__data__x", "from megatron_rl.rewards import Reward", "imports sideways"),
    "sideways at the bottom": ("layers", "megatron_rl__config__x", "import megatron_rl.registry", "imports sideways"),
    "through the face": ("layers", "megatron_rl__trainer__loop", "from megatron_rl import Actor", "package's face"),
    "unknown room": ("layers", "megatron_rl__engined__loop", "", "'engined' has no level"),
    "megatron in data": ("third parties", "megatron_rl__data__x", "from megatron.core import a", "megatron.core.a is"),
    "megatron in workers": (
        "third parties",
        "megatron_rl__workers__x",
        "from megatron.core import parallel_state",
        "megatron.core.parallel_state is",
    ),
    "megatron in models": (
        "third parties",
        "megatron_rl__models__family",
        "from megatron.core.transformer.transformer_config import TransformerConfig",
        "imported only in",
    ),
    "megatron in the face of the engines": (
        "third parties",
        "megatron_rl__engines__base",
        "from megatron.core import dist_checkpointing",
        "imported only in",
    ),
    "a backend in workers": (
        "third parties",
        "megatron_rl__workers__x",
        "from megatron_rl.engines.megatron.engine import MegatronEngine",
        "imported only in engines",
    ),
    "tensorboard in trainer": (
        "third parties",
        "megatron_rl__trainer__x",
        "from torch.utils.tensorboard import SummaryWriter",
        "only in tracking",
    ),
    "transformers in data": (
        "third parties",
        "megatron_rl__data__x",
        "def f():\n    import transformers",
        "in engines/fsdp2, models",
    ),
    "cuda in trainer": ("hardware", "megatron_rl__trainer__x", "import torch\ntorch.cuda.synchronize()", "torch.cuda"),
    "cuda imported": ("hardware", "megatron_rl__trainer__x", "from torch.cuda import Event", "torch.cuda.Event"),
    "backend named": ("hardware", "megatron_rl__workers__x", "def f(backend='gloo'): ...", "'gloo'"),
    "two backends named": ("hardware", "megatron_rl__workers__x", "B = 'cpu:gloo,cuda:nccl'", "nccl"),
    "cuda in the planner": ("hardware", "megatron_rl__reshard__plan", "import torch\nx = torch.cuda", "torch.cuda"),
    "long file": ("file size", "megatron_rl__ops__x", "x = 1\n" * 400, "401 lines"),
    "long test": ("file size", "tests__x", "x = 1\n" * 400, "401 lines"),
    "long function": ("function size", "tools__x", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
    "standard-library name": ("names", "megatron_rl__ops__math", "", "standard-library"),
    "standard-library folder": ("names", "megatron_rl__logging__x", "", "standard-library"),
    "vague name": ("names", "megatron_rl__ops__utils", "", "does not say"),
    "print": ("prints", "megatron_rl__trainer__x", "print('step')", "print()"),
    "long example": ("examples", "examples__a__train", "x = 1\n" * 60, "61 lines"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rule_finds_what_it_forbids(case: str, tmp_path: Path) -> None:
    rule, path, content, expected = BROKEN[case]
    found = RULES[rule](tree(tmp_path, **{path: content}))
    assert len(found) == 1
    assert expected in found[0]


# case -> (module -> what it imports), and the cycle that is found
CYCLES = {
    "at the top": (
        {"plan": "import megatron_rl.reshard.route", "route": "from .plan import ReshardPlan"},
        "plan -> megatron_rl.reshard.route -> megatron_rl.reshard.plan",
    ),
    "under TYPE_CHECKING": (
        {"plan": "from . import route", "route": "if TYPE_CHECKING:\n    from .plan import ReshardPlan"},
        "plan -> megatron_rl.reshard.route -> megatron_rl.reshard.plan",
    ),
    "inside a function": (
        {"plan": "def f():\n    from . import route", "route": "from . import wire", "wire": "from . import plan"},
        "plan -> megatron_rl.reshard.route -> megatron_rl.reshard.wire -> megatron_rl.reshard.plan",
    ),
    "through its own package": (
        {"__init__": "from .plan import ReshardPlan", "plan": "from megatron_rl.reshard import ReshardPlan"},
        "megatron_rl.reshard -> megatron_rl.reshard.plan -> megatron_rl.reshard",
    ),
    "through the package of another module": (
        {"a/__init__": "from .one import X", "a/one": "from ..b import Y", "a/two": "", "b": "from .a import two"},
        "megatron_rl.reshard.a -> megatron_rl.reshard.a.one -> megatron_rl.reshard.b -> megatron_rl.reshard.a",
    ),
}


@pytest.mark.parametrize("case", CYCLES)
def test_modules_that_import_one_another_are_found(case: str, tmp_path: Path) -> None:
    contents, expected = CYCLES[case]
    for name, content in contents.items():
        path = tmp_path / "megatron_rl" / "reshard" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (found,) = RULES["cycles"](tmp_path)
    assert expected in found


def test_neighbours_in_a_package_that_exports_both_are_no_cycle(tmp_path: Path) -> None:
    exports = "from megatron_rl.reshard.plan import ReshardPlan\nfrom megatron_rl.reshard.route import Route"
    plan = "from megatron_rl.reshard.route import Route"
    root = tree(
        tmp_path,
        megatron_rl__reshard__plan=plan,
        megatron_rl__reshard__route="",
        megatron_rl__weights__sync="from megatron_rl.reshard import ReshardPlan",
    )
    (root / "megatron_rl" / "reshard" / "__init__.py").write_text(exports)
    assert RULES["cycles"](root) == []


def test_rule_finds_a_module_without_docstring(tmp_path: Path) -> None:
    (tmp_path / "megatron_rl").mkdir()
    (tmp_path / "megatron_rl" / "run.py").write_text("x = 1\n")
    assert RULES["docstrings"](tmp_path) == ["megatron_rl/run.py: no module docstring"]


def test_a_sound_tree_has_no_violation(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        megatron_rl__reshard__plan="import megatron_rl.reshard.layout\nfrom megatron_rl.registry import nearest",
        megatron_rl__reshard__transport="import torch\nBACKEND = 'nccl'\ntorch.cuda.synchronize()",
        megatron_rl__run="from megatron_rl import __version__\nfrom .trainer.loop import TrainingLoop",
        megatron_rl__cli__main="def f():\n    print('all ranks agree over gloo')",
        megatron_rl__workers__actor="from megatron_rl.engines import base\n'a sentence that names gloo and nccl'",
        megatron_rl__engines__build="from megatron_rl.engines.megatron import build",
        megatron_rl__engines__megatron__build="from megatron.core import mpu",
        megatron_rl__models__megatron_architecture="import megatron.core.transformer.transformer_config",
        examples__arithmetic_grpo__pretrain="x = 1\n" * 200,
    )
    assert {rule: check(root) for rule, check in RULES.items() if check(root)} == {}


def test_one_line_that_breaks_a_layer_is_found_in_a_copy_of_this_project(tmp_path: Path) -> None:
    for path in (ROOT / "megatron_rl").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    assert layer_violations(tmp_path) == layer_violations(ROOT)
    layout = tmp_path / "megatron_rl" / "reshard" / "layout.py"
    layout.write_text(layout.read_text() + "\nimport megatron_rl.algorithms\n")
    assert len(layer_violations(tmp_path)) == len(layer_violations(ROOT)) + 1
