"""Run in SGLang's own environment: what its model classes hold after its own loader has read a Hugging Face folder.

usage: sglang_shards.py OUT FOLDER...    writes OUT/<folder's name>-tp<TP>-ep<EP>-<rank>.safetensors for TP 1, 2 and 4,
and for EP 2 of mixtures of experts

Each rank is a fork of this process, which has imported everything once, all of SGLang's models among it; no server
runs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.model_loader import get_model
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs

LATE = ("sglang.srt.layers.sampler", "sglang.srt.models.registry")  # SGLang imports these while it makes a model


def load(folder: Path, tp: int, ep: int, rank: int, port: int) -> dict[str, torch.Tensor]:
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(["0"] * tp)  # a core for each rank, though it be the same
    arguments = ServerArgs(
        model_path=str(folder),
        device="cpu",
        attention_backend="intel_amx" if folder.name == "gpt_oss" else "torch_native",  # it refuses the other
        tp_size=tp,
        ep_size=ep,
        disable_shared_experts_fusion=True,  # as megatron_rl starts servers
        load_format="dummy",
        dtype="bfloat16",
        max_total_tokens=1024,
        skip_tokenizer_init=True,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0, dp_rank=None))
    bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    config = ModelConfig.from_server_args(arguments)
    bootstrap.init_layer_runtime(model_config=config)
    model = get_model(
        model_config=config, load_config=LoadConfig(load_format="dummy"), device_config=DeviceConfig("cpu")
    )
    model.load_weights(list(load_file(folder / "model.safetensors").items()))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def be_rank(out: Path, folder: Path, tp: int, ep: int, rank: int, port: int) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        save_file(load(folder, tp, ep, rank, port), out / f"{folder.name}-tp{tp}-ep{ep}-{rank}.safetensors")
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    for name in LATE:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would write to, and so copy, every page
    for folder in folders:
        mixes = "num_experts_per_tok" in json.loads((folder / "config.json").read_text())
        mixes = mixes and folder.name != "gpt_oss"  # which SGLang's own loader cannot read with expert parallelism
        for tp, ep in ((1, 1), (2, 1), (4, 1), (4, 2)) if mixes else ((1, 1), (2, 1), (4, 1)):
            port, children = free_port(), []
            for rank in range(tp):
                child = os.fork()
                if child == 0:
                    be_rank(out, folder, tp, ep, rank, port)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            if any(codes):
                sys.exit(f"{folder.name} at tp={tp} ep={ep} failed: {codes}")


if __name__ == "__main__":
    main()
