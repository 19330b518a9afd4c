"""Finds the network interface by which this machine reaches the other machines of a run.

gloo listens at the address that this machine's own name resolves to. That is loopback on Debian and Ubuntu, and may be
a network that the other machines cannot reach. What they certainly can reach is MASTER_ADDR, for there all ranks meet.
NCCL needs no help: by itself it takes InfiniBand's interfaces, or else any but loopback, docker's and libvirt's.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, Protocol

import psutil

from dapo_megatron.errors import ConfigError
from dapo_megatron.routes import Route, bare, find_route

_ADVICE = "set GLOO_SOCKET_IFNAME to the interface by which this machine reaches the others"

_LOOPBACKS = ("lo", "lo0")


class Store(Protocol):
    """Where ranks find one another (torch.distributed.Store); `get` waits for a value, up to the store's limit."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...


def find_interface(host: str, rank: int, world_size: int, store: Store) -> str:
    """Return the interface by which this machine reaches the others. All ranks call this.

    Where `host` is this machine, its name may lead to loopback, here and nowhere else. Then the ranks of another
    machine say under which address they reach it.

    Args:
        host: the name or address at which all ranks meet (MASTER_ADDR).
        store: has the same content on every rank.

    Raises:
        ConfigError: where `host` does not resolve, or leads to no interface of this machine.
    """
    own = route(host)
    tell(rank, store, "" if own.stays else own.remote)
    if not own.stays:
        return interface_of(own)
    # The last ranks are on another machine than the first.
    seen = (store.get(f"route/{other}").decode() for other in reversed(range(world_size)))
    address = next(filter(None, seen), None)
    # If it is loopback to all of them, they are all on this machine.
    return interface_of(Route(address, own.remote, 0) if address else own)


def tell(rank: int, store: Store, address: str = "") -> None:
    """Say under which address this rank reaches the leader's machine; none where it was told its interface."""
    store.set(f"route/{rank}", address)


def route(host: str) -> Route:
    """Return the way to `host`. Nothing is sent.

    Raises:
        ConfigError: where there is none.
    """
    try:
        return find_route(host)
    except OSError as reason:
        raise ConfigError(f"no way from {socket.gethostname()} to MASTER_ADDR={host}: {reason}; {_ADVICE}") from None


def interface_of(way: Route, addresses: Mapping[str, list[Any]] | None = None) -> str:
    """Return the interface that has the address `way.local`.

    Args:
        addresses: what `psutil.net_if_addrs` gives, which is asked otherwise.

    Raises:
        ConfigError: where there is none.
    """
    if way.scope:
        return socket.if_indextoname(way.scope)
    addresses = psutil.net_if_addrs() if addresses is None else addresses
    families = (socket.AF_INET, socket.AF_INET6)
    here = {name: [bare(entry.address) for entry in of if entry.family in families] for name, of in addresses.items()}
    found = next((name for name, own in here.items() if way.local in own), None)
    if found is None and way.stays:  # all of 127.0.0.0/8 is loopback's, whose own address is the first of it
        found = next((name for name, own in here.items() if "127.0.0.1" in own), None)
    if found in _LOOPBACKS and not way.stays:
        raise ConfigError(
            f"the other machines reach {socket.gethostname()} at {way.local}, an address of its loopback interface, "
            f"{found}, of which gloo would take another one; {_ADVICE}"
        )
    if found is None:
        listed = ", ".join(f"{name} {own[0]}" for name, own in here.items() if own)
        raise ConfigError(
            f"the other machines reach {socket.gethostname()} at {way.local}, which is no address of it ({listed}); "
            f"{_ADVICE}"
        )
    return found
