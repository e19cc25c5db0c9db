"""`convert` as people type it; what it does with weights is tests/engines/test_conversion.py's subject."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small_disk import mounted_disk
from small_run import write_run
from stored_arguments import forget_arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    write_run(folder)
    return folder / "model"


def assert_same_weights(folder: Path, original: Path) -> None:
    found, expected = load_file(folder / "model.safetensors"), load_file(original / "model.safetensors")
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_convert_to_megatron_and_back_is_bitwise(command, model, tmp_path):
    there = command("convert", model, tmp_path / "megatron", "--to", "megatron")
    assert there.code == 0, there.err
    assert there.out.splitlines()[0] == f"wrote {tmp_path / 'megatron'}"
    assert f"--load {tmp_path / 'megatron'} --use-checkpoint-args --norm-epsilon" in there.out
    back = command("convert", tmp_path / "megatron", tmp_path / "back", "--to", "hf")
    assert back.code == 0, back.err
    assert_same_weights(tmp_path / "back", model)


def test_a_full_disk_is_one_line_that_names_the_file(command, model, tmp_path):
    """The model's file is larger than the file system; so is a checkpoint of it."""
    with mounted_disk(tmp_path, "64k") as disk:
        for to, name in (("hf", "model.safetensors"), ("megatron", "")):
            done = command("convert", model, disk / to, "--to", to)
            assert done.code == 2, done.err
            line = done.err.strip().splitlines()[-1]
            assert line.startswith("[rank 0] "), done.err
            assert "No space left on device" in line or "disk full" in line
            assert name in line
            assert "Traceback" not in done.err
            assert list(disk.iterdir()) == []


def test_convert_exports_the_checkpoint_of_a_training_run(command, model, tmp_path):
    outputs = tmp_path / "out"
    settings = [f"trainer.{item}" for item in (f"output_dir={outputs}", "num_steps=1", "export=true")]
    assert command("train", model.parent / "config.yaml", *settings).code == 0
    checkpoint = outputs / "checkpoints" / "step_000001"
    done = command("convert", checkpoint, tmp_path / "hf", "--to", "hf")
    assert done.code == 0, done.err
    assert_same_weights(tmp_path / "hf", outputs / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    weights = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    refused = command("convert", checkpoint, tmp_path / "no", "--to", "hf")
    assert refused.code == 2
    assert f"checkpoint {checkpoint} is damaged: {weights.name} is not as it was written" in refused.error
    assert not (tmp_path / "no").exists()
    assert command("convert", checkpoint, tmp_path / "yes", "--to", "hf", "--no-verify").code == 0


def test_convert_is_told_what_a_checkpoint_of_another_program_holds(command, model, tmp_path):
    checkpoint = tmp_path / "megatron"
    assert command("convert", model, checkpoint, "--to", "megatron").code == 0
    shutil.rmtree(checkpoint / "release" / "hf")
    forget_arguments(checkpoint / "release")
    unexplained = command("convert", checkpoint, tmp_path / "hf", "--to", "hf")
    assert unexplained.code == 2
    assert "does not say what model it holds" in unexplained.error
    assert not (tmp_path / "hf").exists()
    done = command("convert", checkpoint, tmp_path / "hf", "--to", "hf", "--config", model)
    assert done.code == 0, done.err
    assert_same_weights(tmp_path / "hf", model)


@pytest.mark.distributed
def test_convert_starts_torchrun_for_the_sizes_that_it_is_given(command, model, tmp_path):
    """The command as the README shows it, with no torchrun around it: two ranks hold half of the model each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    target = tmp_path / "megatron"
    arguments = ["-m", "megatron_rl", "convert", str(model), str(target), "--to", "megatron", "--tp", "2"]
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (target / "release" / "__1_0.distcp").is_file()  # the second rank's file
    assert command("convert", target, tmp_path / "back", "--to", "hf").code == 0
    assert_same_weights(tmp_path / "back", model)


def test_convert_refuses_a_source_that_is_not_there(command, tmp_path):
    ended = command("convert", "/nowhere/model", tmp_path / "x", "--to", "hf")
    assert ended.code == 2
    assert "/nowhere/model is neither a folder nor a model id" in ended.error


def test_convert_refuses_a_config_that_is_not_there(command, model, tmp_path):
    ended = command("convert", model, tmp_path / "x", "--to", "hf", "--config", "/nowhere/config.json")
    assert ended.code == 2
    assert "--config /nowhere/config.json: no such file" in ended.error


def test_convert_keeps_a_target_that_exists_unless_told_otherwise(command, model, tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    ended = command("convert", model, target, "--to", "hf")
    assert ended.code == 2
    assert "exists and is not empty" in ended.error
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    assert command("convert", model, target, "--to", "hf", "--overwrite").code == 0
    assert not (target / "notes.txt").exists()
    assert_same_weights(target, model)


def test_convert_refuses_a_format_that_it_does_not_know(command, model, tmp_path):
    assert command("convert", model, tmp_path / "x", "--to", "gguf").code == 2
    assert not (tmp_path / "x").exists()


def test_a_proof_needs_no_target_and_finds_what_no_one_would_read(command, model, tmp_path):
    proved = command("convert", model, "--prove", "--tp", "2", "--pp", "2", "--rollout-tp", "2")
    assert proved.code == 0, proved.err
    assert proved.out.splitlines()[-1].startswith("proved: a bijection")
    shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.mask": torch.ones(3)}, tmp_path / "other" / "model.safetensors")
    refused = command("convert", tmp_path / "other", tmp_path / "x", "--to", "megatron", "--prove")
    assert refused.code == 2
    assert "unclaimed: model.layers.0.mlp.mask rows 0 to 2" in refused.error
    assert not (tmp_path / "x").exists()
    assert "--to hf or --to megatron is not given" in command("convert", model, tmp_path / "x").error
