"""Ways through the network, as the system would take them."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import NamedTuple

LOOPBACK = "127.0.0.1"


class Route(NamedTuple):
    """The ends of a way through the network, as addresses without a scope."""

    local: str
    remote: str
    scope: int
    """Number of the interface that `local` belongs to where the address alone does not say; 0 elsewhere."""

    @property
    def stays(self) -> bool:
        """Whether no other machine can come this way."""
        return ipaddress.ip_address(self.local).is_loopback


def find_route(host: str) -> Route:
    """Return the way to `host`. Nothing is sent.

    Raises:
        OSError: where there is none.
    """
    reason = OSError("no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                local, remote = probe.getsockname(), probe.getpeername()
                return Route(bare(local[0]), bare(remote[0]), local[3] if family == socket.AF_INET6 else 0)
        except OSError as error:
            reason = error
    raise reason


def address_for(others: Iterable[str]) -> set[str]:
    """Return the addresses of this machine by which `others` are reached, and reach it.

    >>> address_for(["127.0.0.1", "localhost"])
    {'127.0.0.1'}

    Raises:
        OSError: where there is no way to one of them.
    """
    routes = [find_route(host) for host in others]
    away = {route.local for route in routes if route.local != route.remote and not route.stays}
    # Those on this machine reach it at any of its addresses.
    return away or {LOOPBACK}


def bare(address: str) -> str:
    """Spell an address in the one way, without the interface that may follow it."""
    return str(ipaddress.ip_address(address.partition("%")[0]))
