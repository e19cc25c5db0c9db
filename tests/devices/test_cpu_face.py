"""The CPU face: every rewrite and patch does what it says, on the lines it cites, and nothing outside Megatron-Core."""

from __future__ import annotations

import ast
import importlib.util
import logging
import py_compile
import types
from pathlib import Path

import pytest
import torch

import megatron_rl  # noqa: F401  (installs the face before megatron.core is imported)
from megatron_rl.devices.cpu_face import KNOWN_VERSIONS, PATCHES, REWRITES, install_cpu_face, torch_cuda
from megatron_rl.devices.cpu_face.finder import CpuFaceFinder, CpuFaceLoader
from megatron_rl.devices.cpu_face.rewrite import STAND_IN, rewritten

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU face does nothing where a GPU is visible")

core = importlib.import_module("megatron.core")
SOURCE = Path(core.__file__).parent


def run(source: str, **names: object) -> dict[str, object]:
    scope: dict[str, object] = {STAND_IN: torch_cuda, "torch": torch, **names}
    exec(rewritten(source.encode(), "<test>"), scope)
    return scope


def test_torch_cuda_becomes_the_stand_in_and_torch_itself_stays() -> None:
    scope = run(
        "seen, still = torch.cuda, torch.nn\ndevice = torch.zeros(2, device=torch.cuda.current_device()).device"
    )
    assert scope["seen"] is torch_cuda
    assert scope["still"] is torch.nn
    assert scope["device"] == torch.device("cpu")


def test_methods_that_move_a_tensor_return_it_as_it_is() -> None:
    scope = run("a = x.cuda(non_blocking=True)\nb = x.pin_memory()\nc = x.view(1, 3).cuda()", x=torch.arange(3))
    assert scope["a"] is scope["b"] is scope["x"]
    assert torch.equal(scope["c"], torch.tensor([[0, 1, 2]]))


def test_pin_memory_arguments_are_false_whatever_was_written() -> None:
    scope = run("def f(**k): return k\na = f(pin_memory=True)\nb = f(pin_memory=f)")
    assert scope["a"] == scope["b"] == {"pin_memory": False}


def test_only_the_exact_device_name_and_tensor_types_change() -> None:
    scope = run("names = ['cuda', 'cuda_graph', 'my cuda', 'torch.cuda.FloatTensor', 'torch.cuda', 3, b'cuda']")
    assert scope["names"] == ["cpu", "cuda_graph", "my cuda", "torch.FloatTensor", "torch.cuda", 3, b"cuda"]


def test_errors_in_rewritten_code_report_the_original_lines() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run("a = torch.cuda.current_device()\n\nb = 1 / 0")
    assert caught.traceback[-1].lineno == 2


@pytest.mark.skipif(core.__version__ != "0.16.1", reason="the cited lines are those of 0.16.1")
@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rule: rule.name)
def test_every_cited_upstream_line_is_changed_by_its_rewrite(rewrite) -> None:
    for cite in rewrite.upstream:
        file, line = cite.split()[0].split(":")
        nodes = ast.walk(ast.parse((SOURCE / file).read_text()))
        here = [n for n in nodes if isinstance(n, rewrite.node) and abs(n.lineno - int(line)) <= 1]
        before = [ast.dump(node) for node in here]
        assert [ast.dump(rewrite.apply(node)) for node in here] != before, f"{cite} does not need {rewrite.name!r}"


@pytest.mark.parametrize("patch", [p for p in PATCHES if p.symbols], ids=lambda p: p.symbols[0])
def test_every_patched_symbol_is_in_place(patch) -> None:
    module = importlib.import_module(patch.module)
    for symbol in patch.symbols:
        assert symbol in vars(module)


def test_fusions_run_eagerly_without_touching_torch_compile() -> None:
    from megatron.core.jit import enable_jit_fuser, jit_fuser

    def fused() -> None: ...

    assert jit_fuser(fused) is fused
    enable_jit_fuser()
    assert importlib.import_module("megatron.core.jit").jit_fuser(fused) is fused


def test_a_fork_of_the_rng_tracker_draws_from_its_own_stream_and_restores_the_outer_one(caplog) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("inner", 77)
    expected_inner = torch.rand(6, generator=torch.Generator().manual_seed(77))
    expected_outer = torch.rand(6, generator=torch.Generator().manual_seed(1))
    drawn = [torch.rand(2)]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with tracker.fork("inner"):
                drawn.append(torch.rand(3))
            drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn[1::2]), expected_inner)
    assert torch.equal(torch.cat(drawn[0::2]), expected_outer)
    assert not caplog.records


def test_without_its_patch_the_rng_setter_silently_does_nothing() -> None:
    spec = importlib.util.find_spec("megatron.core.tensor_parallel.random")
    assert isinstance(spec.loader, CpuFaceLoader)
    module = types.ModuleType(spec.name)
    module.__package__ = "megatron.core.tensor_parallel"
    module.__dict__[STAND_IN] = torch_cuda
    exec(spec.loader.get_code(spec.name), module.__dict__)
    before = torch.get_rng_state()
    module._set_cuda_rng_state(torch.Generator().manual_seed(5).get_state())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_version_gets_one_warning_and_a_known_one_none(recwarn) -> None:
    check = next(patch.apply for patch in PATCHES if patch.module.endswith("package_info"))
    for version in KNOWN_VERSIONS:
        check(types.SimpleNamespace(__version__=version))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"9\.9\.9 has not been tried on CPU.*0\.16\.1 \(tested\)"):
        check(types.SimpleNamespace(__version__="9.9.9"))


def test_a_stale_or_foreign_pyc_is_neither_read_nor_written(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("device = 'stale'")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH  # Python's own loader would run it unread
    cached = Path(py_compile.compile(str(file), invalidation_mode=unchecked))
    file.write_text("device = 'cuda'")
    poison = cached.read_bytes()
    scope: dict[str, object] = {}
    exec(CpuFaceLoader("module", str(file)).get_code("module"), scope)
    assert scope["device"] == "cpu"
    assert cached.read_bytes() == poison
    cached.unlink()
    CpuFaceLoader("module", str(file)).get_code("module")
    assert not cached.exists()


def test_installing_again_changes_nothing() -> None:
    import sys

    before = list(sys.meta_path)
    assert install_cpu_face()
    assert sys.meta_path == before
    assert sum(isinstance(finder, CpuFaceFinder) for finder in before) == 1


def test_late_installation_says_what_to_do(monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, CpuFaceFinder)])
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=r"`import megatron_rl` above the first `import megatron\.core`"):
        install_cpu_face()
    assert sys.meta_path == before
