"""Does this Megatron-Core import, build a model and train it one step here? One JSON object on the last line."""

from __future__ import annotations

import json
import platform

import megatron_rl  # noqa: F401  first: it lets Megatron-Core run where there is no GPU

# isort: split
import torch
from megatron.core import package_info

from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.models import Architecture
from megatron_rl.parallel import ParallelContext, ParallelSizes

ARCHITECTURE = Architecture("llama", 2, 64, 128, 4, 2, 16, 128, tied=False, max_positions=64)


def main() -> None:
    device = current_platform().device
    sizes = ParallelSizes()
    context = ParallelContext.create(sizes, timeout=60, seed=1)
    (model,) = build_model(ARCHITECTURE, transformer_config(ARCHITECTURE, sizes), pg_collection=context.collection)
    tokens = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(32, device=device).expand(2, 32)
    losses = []
    for _ in range(2):  # one step of gradient descent lowers the loss
        loss = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert losses[1] < losses[0], losses
    result = {
        "megatron_core": package_info.__version__.split("+")[0],  # it adds the commit of the folder
        "python": platform.python_version(),
        "device": device.type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
    }
    print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
