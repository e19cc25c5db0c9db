"""A damaged checkpoint is named with its file, and passed over or refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.models.checkpoint_digests import FILE, digest, find_damage
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.trainer.checkpoint import DistributedCheckpoints
from megatron_rl.trainer.restart_point import CheckpointError, intact_checkpoint


def flip_a_bit(path: Path) -> None:
    """In the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ParallelSizes(), seed=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory, context) -> Path:
    """Checkpoints of steps 1, 2 and 3, of which the generators are all the tensors."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = DistributedCheckpoints(folder, context, {}, {}, keep_last=3, describe=describe)
    for step in (1, 2, 3):
        checkpoints.save(SimpleNamespace(step=step, state_dict=lambda step=step: {"step": step}))
    return folder


def describe(checkpoint: Path) -> None:
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf" / "config.json").write_text('{"a": 1}\n')


@pytest.fixture
def folder(written, tmp_path) -> Path:
    shutil.copy(written.with_name(".checkpoints.order"), tmp_path)
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_every_file_has_a_digest_in_the_form_of_xxh128sum(folder):
    lines = (folder / "step_000003" / FILE).read_text().splitlines()
    names = [line[34:] for line in lines]
    assert names == sorted({".metadata", "__0_0.distcp", "common.pt", "hf/config.json", "metadata.json"})
    for line, name in zip(lines, names, strict=True):
        assert line == f"{digest(folder / 'step_000003' / name)}  {name}"
    # What `printf '{"a": 1}\n' | xxh128sum` prints.
    assert f"{XXH128SUM}  hf/config.json" in lines


XXH128SUM = "65c049e594f67b995b6f57e211c9b1b8"


FILES = (".metadata", "__0_0.distcp", "common.pt", "hf/config.json", "metadata.json")
HARM = [(name, harm) for name in (*FILES, FILE) for harm in (flip_a_bit, cut, Path.unlink)]
HARM.remove((FILE, Path.unlink))  # a checkpoint without digests is an older one


@pytest.mark.parametrize(("name", "harm"), HARM, ids=lambda value: getattr(value, "__name__", value))
def test_damage_to_any_file_is_seen(name: str, harm: Callable[[Path], object], folder):
    harm(folder / "step_000003" / name)
    found = find_damage(folder / "step_000003")
    assert found.startswith(name) or name == FILE, found
    assert found
    assert not find_damage(folder / "step_000002")


@pytest.mark.parametrize(
    ("name", "harm"),
    [(".metadata", cut), (".metadata", Path.unlink), ("__0_0.distcp", cut), ("__0_0.distcp", Path.unlink),
     ("common.pt", cut), ("common.pt", Path.unlink), ("metadata.json", Path.unlink)],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_without_digests_files_that_are_missing_or_cut_are_seen(name: str, harm: Callable[[Path], object], folder):
    for step in ("step_000002", "step_000003"):
        (folder / step / FILE).unlink()
    harm(folder / "step_000003" / name)
    assert find_damage(folder / "step_000003").startswith(name)
    assert not find_damage(folder / "step_000002")


def test_the_files_are_shared_out_over_the_ranks(folder):
    flip_a_bit(folder / "step_000003" / "common.pt")
    assert sum(bool(find_damage(folder / "step_000003", rank, 4)) for rank in range(4)) == 1


def test_auto_passes_over_what_is_damaged_and_says_so(folder, context, caplog):
    flip_a_bit(folder / "step_000003" / "__0_0.distcp")
    shutil.rmtree(folder / "step_000002" / "hf")
    logging.getLogger("megatron_rl").propagate = True
    with caplog.at_level(logging.WARNING):
        assert intact_checkpoint(folder, "auto", context) == folder / "step_000001"
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {folder}/step_000003 is damaged: __0_0.distcp is not as it was written (its digest differs from "
        f"that in {FILE}); continuing from {folder}/step_000001, the newest intact one"
    ]


@pytest.mark.parametrize("given", ["step_000003", "{folder}/step_000003"])
def test_a_damaged_checkpoint_asked_for_by_name_is_refused(given, folder, context):
    (folder / "step_000003" / "metadata.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"step_000003 is damaged: metadata.json is missing; the newest intact one"
    ):
        intact_checkpoint(folder, given.format(folder=folder), context)


def test_a_run_never_starts_afresh_because_all_its_checkpoints_are_damaged(folder, context):
    for checkpoint in folder.iterdir():
        cut(checkpoint / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="holds no intact one: restore it from a copy"):
        intact_checkpoint(folder, "auto", context)


def test_what_a_killed_run_left_half_written_is_taken_away(folder, context):
    partial = folder / "step_000004.partial"
    partial.mkdir()
    checkpoints = DistributedCheckpoints(folder, context, {}, {})
    state: dict = {}
    assert checkpoints.restore(SimpleNamespace(load_state_dict=state.update))
    assert state == {"step": 3}
    assert not partial.exists()
