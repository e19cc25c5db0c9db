"""`SGLangConfig`: what ``actor.rollout.options`` may hold for the sglang engine."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_rl.config import ConfigRecord
from megatron_rl.rollout.sglang.membership import RetryPolicy
from megatron_rl.rollout.sglang.server import ServerConfig
from megatron_rl.rollout.sglang.weight_transfer import TRANSFERS


def _options_of(delivery: type) -> set[str]:
    """What may be said of a way of weights to the servers: the keywords that have a default, of all of its classes."""
    makers = [vars(kind)["__init__"] for kind in delivery.__mro__ if "__init__" in vars(kind) and kind is not object]
    parameters = [one for maker in makers for one in inspect.signature(maker).parameters.values()]
    return {one.name for one in parameters if one.default is not one.empty} - {"device"}  # that the engine gives


class SGLangConfig(ConfigRecord):
    """Options of the engine; the servers' dtype and tensor parallelism are those of ``actor.rollout``."""

    urls: tuple[str, ...] = ()
    """Attach to these servers, at least one for each rollout replica, dealt out in turn; none = start servers."""
    server: ServerConfig = ServerConfig()
    """How to start servers."""
    servers: int = Field(default=1, ge=1)
    """Servers that each replica starts; all get the replica's weights and share its requests."""
    delivery: str | None = None
    """Name of a registered way for weights to reach the servers; None = `direct`, or `flattened_bucket` for a model
    without a family."""
    delivery_options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of that delivery."""
    pause: Literal["retract", "in_place"] = "retract"
    """What an update does to running requests. retract: their cache is computed anew with the new weights. in_place:
    they go on with the old weights' cache."""
    concurrency: int | None = Field(default=None, ge=1)
    """Sequences sent to a server at a time; None = twice what it runs at once, so that it never waits for us."""
    request_timeout: float = Field(default=3600.0, gt=0)
    """Seconds in which a request must be answered, waiting at the server included."""
    attempts: int = Field(default=8, ge=1)
    """Tries of one request, over all servers, before the run ends with an error."""
    recovery_timeout: float = Field(default=900.0, gt=0)
    """Seconds that requests wait for a server to come back when none serves, and a push for the first of ``urls``."""
    stream: bool = False
    """Have servers send tokens as they come, so that those of a server that fails are kept and another one goes on
    behind them; for long responses. See docs/sglang.md."""
    health_interval: float = Field(default=30.0, gt=0)
    """Seconds between looks at servers that work on requests; one that fails two in a row is given up."""
    return_routed_experts: bool = False
    """Keep which experts each token went to, as ``metadata["routed_experts"]`` of the sample."""
    memory_saver: bool = False
    """Start servers so that `sleep` gives their GPU memory back."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.urls and "server" in self.model_fields_set:
            raise ValueError("urls and server exclude each other: attach to running servers, or start some")
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or self.urls.count(url) > 1:
                raise ValueError(f"urls has {url!r}: expected one http://host:port of each server")
        known = _options_of(TRANSFERS[self.delivery or "direct"]) if self.delivery in (None, *TRANSFERS) else None
        if known is not None and (unknown := sorted(self.delivery_options.keys() - known)):
            raise ValueError(f"delivery_options has {', '.join(unknown)}; known here: {', '.join(sorted(known))}")
        return self

    @property
    def start_timeout(self) -> float:
        """Seconds that a push waits for servers that are starting, or for one of those that it is attached to."""
        return self.recovery_timeout if self.urls else self.server.start_timeout

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(attempts=self.attempts, recovery=self.recovery_timeout, health_interval=self.health_interval)
