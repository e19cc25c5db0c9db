"""Which addresses are this machine: it is never reached through the proxy that http_proxy or all_proxy names."""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.parse import urlsplit


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    host = host.rstrip(".").casefold()
    if host in ("localhost", "ip6-localhost", "localhost.localdomain", socket.gethostname().casefold()):
        return True
    if host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or address.is_unspecified


def reach_directly(url: str) -> None:
    """Make HTTP clients of other packages, which read ``no_proxy`` at each request, reach ``url`` without a proxy if it
    is on this machine."""
    try:
        host = urlsplit(url).hostname
    except ValueError:  # not an address; opening it will raise
        return
    if host is None or not is_this_machine(host):
        return
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if host not in excepted.split(","):
        os.environ["no_proxy"] = ",".join(filter(None, (excepted, host)))
