"""From options to the members of a replica: servers that are started here, or clients of running ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture
from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.membership import Member
from megatron_rl.rollout.sglang.model_folder import check_cpu_layout
from megatron_rl.rollout.sglang.options import SGLangOptions
from megatron_rl.rollout.sglang.replica import Replica
from megatron_rl.rollout.sglang.server import SGLangServer

STREAM_INTERVAL = 16  # tokens of a sample between two chunks


def build_members(
    options: SGLangOptions,
    replica: Replica,
    folder: Path,
    architecture: Architecture,
    dtype: str,
    max_running: int,
    device: torch.device,
    tokenizer: Any,
) -> list[Member]:
    """The replica's servers, launched but not waited for; nothing is known of them yet.

    Raises:
        ConfigError: too few urls, or a CPU server would hold another layout.
    """
    limit = options.concurrency or 2 * max_running
    connections = limit + 2

    def client(url: str) -> SGLangClient:
        return SGLangClient(url, options.request_timeout, connections)

    if options.urls:
        if len(options.urls) < replica.count:
            raise ConfigError(
                f"{len(options.urls)} urls for {replica.count} rollout replicas: each needs a server of its own, so "
                f"start more servers, or raise actor.rollout.tp"
            )
        return [Member(url, limit, client=client(url)) for url in options.urls[replica.index :: replica.count]]
    if device.type == "cpu":
        check_cpu_layout(architecture, replica.tp)
    settings = options.server.model_copy(update={"args": _arguments(options, architecture, device)})
    members = []
    for number in range(options.servers):
        name = f"sglang-replica{replica.index}-{number}"
        kind: Literal["cpu", "cuda"] = "cpu" if device.type == "cpu" else "cuda"
        server = SGLangServer(
            folder,
            settings,
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
    options: SGLangOptions, architecture: Architecture, device: torch.device
) -> dict[str, str | int | float | bool]:
    """Server options that follow from ours; the user's own come last."""
    arguments: dict[str, str | int | float | bool] = {}
    if device.index is not None:
        arguments["base-gpu-id"] = device.index  # the replica's ranks are neighbours, so are their GPUs
    if options.stream:
        # Only what is new, and not at each token: every chunk costs the server and us a millisecond's work.
        arguments |= {"incremental-streaming-output": True, "stream-interval": STREAM_INTERVAL}
    if options.memory_saver:
        arguments["enable-memory-saver"] = True
    if options.return_routed_experts:
        if architecture.experts is None:
            raise ConfigError("return_routed_experts=true, but the model has no experts: leave it out")
        arguments["enable-return-routed-experts"] = True
    return arguments | options.server.args
