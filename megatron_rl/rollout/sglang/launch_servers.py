"""From the config to the members of a replica: servers that are started here, or clients of running ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture
from megatron_rl.rollout.sglang.membership import Member
from megatron_rl.rollout.sglang.model_folder import check_cpu_layout
from megatron_rl.rollout.sglang.replica import Replica
from megatron_rl.rollout.sglang.server import SGLangServer
from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.sglang_config import SGLangConfig

STREAM_INTERVAL = 16  # tokens of a sample between two chunks


def launch_servers(
    config: SGLangConfig,
    replica: Replica,
    folder: Path,
    architecture: Architecture,
    dtype: str,
    max_running: int,
    device: torch.device,
    tokenizer: Any,
    ep: int,
) -> list[Member]:
    """The replica's servers, launched but not waited for; nothing is known of them yet.

    Args:
        ep: expert-parallel ranks among those of one server.

    Raises:
        ConfigError: too few urls, or a CPU server would hold another layout.
    """
    limit = config.concurrency or 2 * max_running
    connections = limit + 2

    def client(url: str) -> SGLangClient:
        return SGLangClient(url, config.request_timeout, connections)

    if config.urls:
        if len(config.urls) < replica.count:
            raise ConfigError(
                f"{len(config.urls)} urls for {replica.count} rollout replicas: each needs a server of its own, so "
                f"start more servers, or raise actor.rollout.tp"
            )
        return [Member(url, limit, client=client(url)) for url in config.urls[replica.index :: replica.count]]
    if device.type == "cpu":
        check_cpu_layout(architecture, replica.tp)
    server_config = config.server.model_copy(update={"args": _arguments(config, architecture, device, ep)})
    members = []
    for number in range(config.servers):
        name = f"sglang-replica{replica.index}-{number}"
        kind: Literal["cpu", "cuda"] = "cpu" if device.type == "cpu" else "cuda"
        server = SGLangServer(
            folder,
            server_config,
            tp=replica.tp,
            dtype=dtype,
            max_running=max_running,
            device=kind,
            with_tokenizer=tokenizer is not None,
            name=name,
        )
        server.launch()
        members.append(Member(name, limit, client=client(server.url), server=server, make_client=client))
    return members


def _arguments(
    config: SGLangConfig, architecture: Architecture, device: torch.device, ep: int
) -> dict[str, str | int | float | bool]:
    """Server options that follow from the config; the user's own come last."""
    arguments: dict[str, str | int | float | bool] = {}
    if device.index is not None:
        arguments["base-gpu-id"] = device.index  # the replica's ranks are neighbours, so are their GPUs
    if ep > 1:
        arguments["ep-size"] = ep
    if config.stream:
        # Only what is new, and not at each token: every chunk costs the server and us a millisecond's work.
        arguments |= {"incremental-streaming-output": True, "stream-interval": STREAM_INTERVAL}
    if config.memory_saver:
        arguments["enable-memory-saver"] = True
    if architecture.experts is not None and architecture.experts.shared_ffn:
        arguments["disable-shared-experts-fusion"] = True  # as one more routed expert it has another layout
    if architecture.experts is not None and architecture.experts.biased:
        if device.type == "cpu":
            raise ConfigError(f"a CPU server of SGLang holds {architecture.family} transposed: use engine: local")
        arguments["moe-runner-backend"] = "triton_kernel"  # others hold the experts transposed
    if config.return_routed_experts:
        if architecture.experts is None:
            raise ConfigError("return_routed_experts=true, but the model has no experts: leave it out")
        arguments["enable-return-routed-experts"] = True
    return arguments | config.server.args
