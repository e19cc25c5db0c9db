"""Builds the C++ and the CUDA operations as first use does, without falling back; one JSON object on the last line.

Without a GPU the CUDA code is compiled for sm_90, and not loaded.
"""

from __future__ import annotations

import json
import time

import torch

from megatron_rl.ops.extension import built, cuda_build, load_cpu, load_cuda


def main() -> None:
    started = time.monotonic()
    load_cpu()
    result: dict[str, object] = {"cpu_s": round(time.monotonic() - started, 1)}
    started = time.monotonic()
    if torch.cuda.is_available():
        load_cuda()
        result["architecture"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        result["operations"] = sorted(name for name in dir(torch.ops.megatron_rl_cuda) if not name.startswith("_"))
    else:
        built(cuda_build("90"))
        result["architecture"] = "sm_90"
    result["cuda_s"] = round(time.monotonic() - started, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
