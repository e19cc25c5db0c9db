"""YAML and overrides become a record, or one error that says where and what."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import ConfigError, ConfigRecord, load_config, save_config


class Parallel(ConfigRecord):
    tp: int = 1
    """Ranks."""
    pp: int = 1
    """Ranks."""


class Part(ConfigRecord):
    name: str
    """What."""
    weight: float = 1.0
    """Factor."""


class Run(ConfigRecord):
    model: str
    """Folder."""
    learning_rate: float = 1e-6
    """Per step."""
    parallel: Parallel = Parallel()
    """Layout."""
    parts: tuple[Part, ...] = ()
    """Parts."""
    output_dir: Path = Path("outputs")
    """Folder."""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides_make_a_record(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nlearning_rate: 5e-7\nparallel:\n  tp: 4\nparts: [{name: a}, {name: b}]\n")
    overrides = ["parallel.pp=2", "parts.1.weight=0.5", "output_dir=/tmp/x=y", "model='10'"]
    config = load_config(Run, path, overrides)
    assert config == Run(
        model="10",
        learning_rate=5e-7,
        parallel=Parallel(tp=4, pp=2),
        parts=(Part(name="a"), Part(name="b", weight=0.5)),
        output_dir=Path("/tmp/x=y"),
    )


def test_override_creates_sections_that_the_file_lacks(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "model: m"), ["parallel.tp=2"]).parallel.tp == 2
    assert load_config(Run, write(tmp_path, "model: m"), ["parallel={tp: 2, pp: 3}"]).parallel == Parallel(tp=2, pp=3)


def test_override_of_a_section_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nparallel: {tp: 4, pp: 4}")
    assert load_config(Run, path, ["parallel={tp: 2}"]).parallel == Parallel(tp=2, pp=1)


def test_references_are_resolved_after_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nparallel: {tp: 2, pp: '${parallel.tp}'}")
    assert load_config(Run, path, ["parallel.tp=4"]).parallel.pp == 4


def test_saved_config_is_complete_and_reads_back_equal(tmp_path: Path) -> None:
    config = Run(model="m: #1", learning_rate=3e-7, parts=(Part(name="ä"),))
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert "pp: 1" in (tmp_path / "deep" / "config.yaml").read_text()
    assert load_config(Run, tmp_path / "deep" / "config.yaml") == config
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("model: [1,\nb: 2\n", [], r"run.yaml:3: not valid YAML"),
        ("model: a\nmodel: b\n", [], r"run.yaml:2: not valid YAML: found duplicate key model"),
        ("- 1\n", [], "holds a list, expected a mapping"),
        ("model: ${there.is.none}", [], "there.is.none"),
        ("learning_rate: 1", [], "'model' is required but not given"),
        ("model: m\nparallel: {tq: 2}", [], "unknown key 'parallel.tq'; did you mean 'parallel.tp'"),
        ("model: m", ["paralel.tp=2"], "unknown key 'paralel'; did you mean 'parallel'"),
        ("model: m", ["parallel.tp=two"], "parallel.tp = 'two'"),
        ("model: m", ["parallel.tp"], "not of the form section.key=value"),
        ("model: m", ["=2"], "not of the form section.key=value"),
        ("model: m", ["parts=[1,"], "the value is not valid YAML"),
        ("model: m", ["model.name=2"], "model = {'name': 2}: Input should be a valid string"),
        ("model: m\nparts: [{name: a}]", ["parts.7.weight=2"], "override 'parts.7.weight=2' does not fit the file"),
    ],
)
def test_each_mistake_is_one_clear_error(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, text), overrides)
    assert expected in str(caught.value)


def test_missing_file_names_the_files_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, "model: m")
    with pytest.raises(ConfigError, match=r"runn.yaml' does not exist; .* has run.yaml"):
        load_config(Run, tmp_path / "runn.yaml")
    with pytest.raises(ConfigError, match="nor does its folder"):
        load_config(Run, tmp_path / "none" / "run.yaml")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: m\r\nparallel: {tp: 4}\r\n")
    assert load_config(Run, path) == Run(model="m", parallel=Parallel(tp=4))
