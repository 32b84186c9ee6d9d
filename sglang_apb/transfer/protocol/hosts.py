"""Where a server's transfer sockets listen."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import NamedTuple


class Address(NamedTuple):
    """Where a prefill rank listens, and its server's public key ("" without)."""

    host: str
    port: int
    key: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def listening_host(host: str) -> str:
    """The address for `--host`: loopback exactly when the server itself is on it.

    Raises OSError when `host` is a name that cannot be resolved.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0])
    if address.is_unspecified:
        from sglang.srt.utils.network import get_local_ip_auto

        address = ipaddress.ip_address(get_local_ip_auto())
    return str(address)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def is_loopback_host(host: str) -> bool:
    """The same of what a user gave: of names `localhost` alone counts, though others may stand for such an address."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def why_not_free(host: str, port: int) -> str:
    """Why nobody can listen there; "" when one can, or when it is not for another to have the port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        return str(error.strerror) if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
    return ""
