"""Whether a service is reached directly or through the proxy that http_proxy, https_proxy or all_proxy names.

This machine is always reached directly, whatever the environment says. Other hosts are reached through the proxy
unless no_proxy covers them: exact names, domains with what is below them, addresses, networks such as 10.0.0.0/8, each
with or without a port, and "*" (as curl's CURLOPT_NOPROXY; httpx alone knows no networks).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

import httpx

from megatron_rl.devices.this_machine import is_this_machine


def reached_directly(url: str, environ: Mapping[str, str]) -> bool:
    """Whether no proxy is to be used for ``url``."""
    parsed = httpx.URL(url)
    host = parsed.host.rstrip(".").casefold()
    if is_this_machine(host):
        return True
    excepted = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    port = parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
    return any(_covers(entry.strip().casefold(), host, port) for entry in excepted.replace(" ", ",").split(","))


def _covers(entry: str, host: str, port: int | None) -> bool:
    """Whether one entry of no_proxy is about ``host``."""
    if not entry:
        return False
    name, given_port = _split_port(entry.removeprefix("http://").removeprefix("https://"))
    if given_port is not None and given_port != port:
        return False
    if name == "*":
        return True
    address = _address(host)
    if address is not None:
        try:
            return address in ipaddress.ip_network(name.strip("[]"), strict=False)
        except ValueError:
            return False
    name = name.removeprefix("*").strip(".")
    return host == name or host.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, int | None]:
    head, colon, tail = entry.rpartition(":")
    if colon and tail.isdigit() and (":" not in head or head.endswith("]")):
        return head, int(tail)
    return entry, None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
