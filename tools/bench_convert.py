"""What converting weights costs: one JSON object on the last line.

`ours`: a Hugging Face folder into a Megatron checkpoint and back into a Hugging Face folder (`convert`, digests
verified, result synced to disk). `theirs`: ``from_pretrained`` and ``save_pretrained`` of `transformers` on the same
folder, in the dtype of its files, then synced as well. Each in a process of its own, which imports everything and
converts a tiny model first; only then clock and memory are read. ``wall_ratio`` is of seconds, ``rss_ratio`` of the
peak of the resident set (VmHWM, reset before) less what was resident before, both ours over theirs (less is better);
medians over rounds in which the two take turns. The result is compared with the source bit by bit.

``smollm2``: SmolLM2-135M, fp32 as it is unpacked, for TP3 x PP2, since its 9 heads and 3 key/value heads divide by 3
alone. ``synthetic_1_5b``: random bf16 weights in the shape of Qwen2.5-1.5B, for TP2 x PP2.

    make bench-convert
    python tools/bench_convert.py --smollm2 FOLDER [--folder WHERE] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resident_memory import growth
from transformers import LlamaConfig, Qwen2Config

from megatron_rl.engines.conversion import convert
from megatron_rl.models import logical_tensors
from megatron_rl.models.hf_config import architecture_from_hf
from megatron_rl.models.safetensors_files import SafetensorsWriter
from megatron_rl.parallel import ParallelSizes
from megatron_rl.reshard import Span
from megatron_rl.reshard.layout import matrix_shape
from megatron_rl.weights.file_copies import row_blocks
from megatron_rl.weights.source import SafetensorsFolder

ROOT, MIB, GIB = Path(__file__).parents[1], 1 << 20, 1 << 30
NEEDED = 14 * GIB  # of the folder, for source, checkpoint and result of the larger model, and a reserve
SIZES = {"smollm2": ParallelSizes(tp=3, pp=2), "synthetic_1_5b": ParallelSizes(tp=2, pp=2)}
LARGE = Qwen2Config(  # huggingface.co/Qwen/Qwen2.5-1.5B config.json
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    dtype="bfloat16",
)


def write_random(config: Any, folder: Path) -> None:
    """Random bf16 numbers between -2 and 2, written block by block."""
    random, tensors = np.random.default_rng(0), logical_tensors(architecture_from_hf(config))
    folder.mkdir(parents=True)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    shapes = {name: (shape, torch.bfloat16) for name, shape in tensors.items()}
    with SafetensorsWriter(folder / "model.safetensors", shapes) as file:
        for name in file.names:
            rows, cols = matrix_shape(tensors[name])
            for start, stop in row_blocks(0, rows, 2 * cols):
                bits = np.frombuffer(random.bytes(2 * (stop - start) * cols), np.int16) & np.int16(-0x4001)
                file.write(torch.from_numpy(bits).view(torch.bfloat16))


def ours(folder: Path, scratch: Path, sizes: ParallelSizes) -> Path:
    convert(folder, scratch / "megatron", "megatron", sizes)
    return convert(scratch / "megatron", scratch / "hf", "hf")


def theirs(folder: Path, scratch: Path, sizes: ParallelSizes) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(scratch / "hf")
    for path in (scratch / "hf").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return scratch / "hf"


WAYS = {"ours": ours, "theirs": theirs}


def measure(way: str, folder: Path, scratch: Path, sizes: ParallelSizes) -> dict[str, float]:
    """In this process, after a tiny conversion that loads whatever is loaded late."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(folder).model_type
    tiny = TINY if kind == "llama" else Qwen2Config(**{k: v for k, v in TINY.to_dict().items() if k != "model_type"})
    write_random(tiny, scratch / "tiny")
    (scratch / "warm").mkdir()
    WAYS[way](scratch / "tiny", scratch / "warm", ParallelSizes(tp=2, pp=2))
    started: list[float] = []

    def run() -> None:
        started.append(time.perf_counter())
        WAYS[way](folder, scratch, sizes)
        started.append(time.perf_counter())

    cpu = time.process_time()
    grown = growth(run)
    return {"s": started[1] - started[0], "cpu_s": time.process_time() - cpu, "rss_mb": grown / MIB}


def measure_apart(way: str, name: str, folder: Path, scratch: Path) -> dict[str, float]:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = [sys.executable, __file__, "--only", way, "--name", name, "--source", str(folder)]
    done = subprocess.run([*command, "--folder", str(scratch)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {way}: {found['s']:.2f} s ({found['cpu_s']:.2f} CPU-s), {found['rss_mb']:.0f} MB", flush=True)
    return found


def check_equal(first: Path, second: Path) -> None:
    """Raise ValueError unless both folders hold the same tensors, bit for bit."""
    with SafetensorsFolder(first) as one, SafetensorsFolder(second) as two:
        if sorted(one.names()) != sorted(two.names()):
            raise ValueError(f"{first} and {second} hold other tensors")
        for name in one.names():
            rows, cols = matrix_shape(one.shape(name))
            for start, stop in row_blocks(0, rows, one.dtype(name).itemsize * cols):
                span = Span(name, start, stop, 0, cols, 0, 0)
                if not torch.equal(one.read(span), two.read(span)):
                    raise ValueError(f"{name} differs between {first} and {second}")


def compare(name: str, folder: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in WAYS:
            found[way].append(measure_apart(way, name, folder, scratch))
            if way == "ours" and turn == 0:
                check_equal(folder, scratch / "hf")
    shutil.rmtree(scratch)
    median = {
        f"{way}_{key}": statistics.median(one[key] for one in found[way])
        for way in WAYS
        for key in ("s", "cpu_s", "rss_mb")
    }
    ratios = {
        "wall_ratio": median["ours_s"] / median["theirs_s"],
        "cpu_ratio": median["ours_cpu_s"] / median["theirs_cpu_s"],
        "rss_ratio": median["ours_rss_mb"] / median["theirs_rss_mb"],
    }
    figures = {key: round(value, 3) for key, value in (ratios | median).items()}
    return figures | {"layout": str(SIZES[name]), "seconds": {w: [round(o["s"], 2) for o in found[w]] for w in WAYS}}


def place(given: Path | None) -> Path:
    """Memory, where there is room, so that no disk is measured; else the repository's build folder."""
    if given is not None:
        return given
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > NEEDED and _available() > NEEDED:
        return shared
    (ROOT / "build").mkdir(exist_ok=True)
    return ROOT / "build"


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, help="Hugging Face folder of SmolLM2-135M; left out without it")
    parser.add_argument("--folder", type=Path, help="where files are written; by default memory, or build/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(SIZES))
    parser.add_argument("--only", choices=WAYS, help="measure this way in this process")
    parser.add_argument("--name", help="of the model, with --only")
    parser.add_argument("--source", type=Path, help="its folder, with --only")
    arguments = parser.parse_args()
    if arguments.only:
        sizes = SIZES[arguments.name]
        print(json.dumps(measure(arguments.only, arguments.source, arguments.folder, sizes)), flush=True)
        return
    where = place(arguments.folder)
    figures: dict[str, Any] = {"where": str(where), "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=where) as name:
        folders = {"smollm2": Path(name) / "smollm2", "synthetic_1_5b": Path(name) / "synthetic"}
        for model in arguments.models:
            if model == "synthetic_1_5b":
                write_random(LARGE, folders[model])
            elif arguments.smollm2 is None or not (arguments.smollm2 / "model.safetensors").is_file():
                print("SmolLM2-135M is not there: it is left out", flush=True)
                figures[model] = None
                continue
            else:
                shutil.copytree(arguments.smollm2, folders[model])
            figures[model] = compare(model, folders[model], Path(name) / "scratch", arguments.rounds)
            shutil.rmtree(folders[model])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
