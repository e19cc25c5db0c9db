"""`prove_folder`: the proof of a conversion (`models/conversion_proof.py`) for the files of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_rl.config import ConfigError
from megatron_rl.models.checkpoint_reader import checkpoint_folder
from megatron_rl.models.conversion_proof import Proof, prove
from megatron_rl.models.hf_config import described_architecture, read_hf_config
from megatron_rl.models.layout_proof import UNCLAIMED, Finding
from megatron_rl.parallel import ParallelSizes
from megatron_rl.weights.hf_in import resolve_folder
from megatron_rl.weights.source import SafetensorsFolder


def prove_folder(
    source: str | Path, sizes: ParallelSizes, rollout_tp: int = 1, rollout_ep: int = 1, drop_mtp: bool = False
) -> Proof:
    """Reads ``config.json`` and the headers of all safetensors files of the folder, and no weights.

    Raises:
        ConfigError: it is no Hugging Face folder, or cannot be read, or the sizes do not fit the model.
    """
    if Path(source).is_dir() and checkpoint_folder(source) is not None:
        raise ConfigError(
            f"{source} is a Megatron checkpoint: --prove takes the Hugging Face folder that the weights come from"
        )
    folder = resolve_folder(source)
    config = read_hf_config(folder)
    architecture = described_architecture(config)
    with SafetensorsFolder(folder) as files:
        stored = files.shapes()
        unread = sorted(path.name for path in set(folder.glob("*.safetensors")) - set(files.files.values()))
    notes = (
        Finding(UNCLAIMED, name, "a file that the index does not name, which nothing reads", False) for name in unread
    )
    found = prove(architecture, stored, sizes, rollout_tp, rollout_ep, drop_mtp)
    return replace(found, findings=(*notes, *found.findings))
