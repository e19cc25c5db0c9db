"""`ServiceConfig`: what every reward service has in common, from address to what happens when it does not answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import httpx
from pydantic import Field, field_validator

from megatron_rl.config import ConfigError, ConfigRecord


class ServiceConfig(ConfigRecord):
    """A reward that a server gives over HTTP."""

    url: str
    """Address of the server, e.g. https://rewards.example:8000; the endpoint's own path is added."""
    text: str = "{prompt}{response}"
    """What a classifier reads; {prompt}, {response} and {answer} are filled in. The model's chat template goes here."""
    token_env: str | None = None
    """Environment variable that holds the bearer token; tokens are never read from configuration."""
    ca_file: str | None = None
    """PEM file of a private certificate authority. Certificates are always verified."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one request, from connecting to the last byte."""
    retries: int = Field(default=4, ge=0)
    """Further attempts after refused or broken connections, timeouts, status 408, 425, 429 and 5xx, or no JSON."""
    retry_wait: float = Field(default=0.5, gt=0)
    """Seconds before the first retry; doubles each time, with jitter, up to 20."""
    batch_size: int = Field(default=16, ge=1)
    """Samples in one request, where the protocol takes several."""
    concurrency: int = Field(default=8, ge=1)
    """Requests under way at once, from each replica of the model."""
    max_response_bytes: int = Field(default=4 << 20, gt=0)
    """A longer response is not read to its end and counts as no answer."""
    on_failure: Literal["stop", "drop"] = "stop"
    """When a reward is missing: stop the run, or drop the sample and count it. It is never taken for 0."""
    cache_dir: str | None = None
    """Folder where answers are kept, by server, model and text; None = nothing is kept."""

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"not an address: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("expected an address like https://host:8000")
        if parsed.userinfo:
            raise ValueError("no credentials in the address: put the token into an environment variable (token_env)")
        return url.rstrip("/")


def bearer_headers(config: ServiceConfig, name: str) -> dict[str, str]:
    """The authorization header, from the environment.

    Raises:
        ConfigError: the variable that ``token_env`` names is not set.
    """
    if config.token_env is None:
        return {}
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise ConfigError(
            f"reward {name!r}: token_env names {config.token_env!r}, which is not set in this process's environment"
        )
    return {"Authorization": f"Bearer {token}"}


def check_ca_file(config: ServiceConfig, name: str) -> None:
    """Raises ConfigError when the certificate file does not exist."""
    if config.ca_file is not None and not Path(config.ca_file).is_file():
        raise ConfigError(f"reward {name!r}: ca_file {config.ca_file!r} does not exist")
