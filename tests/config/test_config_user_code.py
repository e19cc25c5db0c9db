"""User code is found by module or by file, and its absence is explained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_rl.config import ConfigError, load_user_object


def test_object_of_a_module() -> None:
    assert load_user_object("math:gcd") is math.gcd


def test_object_of_a_file_whose_name_is_taken_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math.py").write_text("def score(sample): return 0.5")
    monkeypatch.chdir(tmp_path)
    score = load_user_object("math.py:score")
    assert score(None) == 0.5
    assert load_user_object(f"{tmp_path}/math.py:score") is score


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("math", "expected 'package.module:name' or 'path/to/file.py:name'"),
        (":x", "expected 'package.module:name'"),
        ("no_such_module_here:x", "no module 'no_such_module_here' on the Python path"),
        ("math.deeper:x", "math.deeper"),
        ("math:gdc", "Did you mean 'gcd'?"),
        ("nowhere.py:x", "file 'nowhere.py' does not exist"),
        ("broken.py:x", "running broken.py failed: ZeroDivisionError"),
        ("imports.py:x", "running imports.py failed: ModuleNotFoundError: No module named 'no_such_dependency'"),
    ],
)
def test_absent_or_broken_code_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "imports.py").write_text("import no_such_dependency")
    with pytest.raises(ConfigError) as caught:
        load_user_object(spec)
    assert expected in str(caught.value)
