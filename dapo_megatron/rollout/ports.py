"""Ports for engines to listen on."""

from __future__ import annotations

import errno
import socket

from dapo_megatron.config import EngineConfig
from dapo_megatron.errors import ConfigError

_LAST = 65_535


def reserve_port(host: str, port: int = 0) -> socket.socket:
    """Keep `port`, or a free one for 0, from being given to anyone who does not ask for it by number.

    A server that sets SO_REUSEADDR, as they do, can still listen on it. Close the socket once it does.

    Raises:
        ConfigError: where `host` is no address of this machine, or something listens on the port already.
    """
    if not host:
        raise ConfigError("engine.host is empty; give an address of this machine, such as 127.0.0.1")
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((host, port))
    except (OSError, UnicodeError) as error:
        reserved.close()
        if not isinstance(error, OSError) or error.errno not in (errno.EADDRINUSE, errno.EACCES):
            if addresses := _only_ipv6(host):
                raise ConfigError(
                    f"engine.host={host} has no IPv4 address; give one of its others: {', '.join(addresses)}"
                ) from error
            raise ConfigError(
                f"engine.host={host} is no address or name of this machine ({error}); give one that "
                f"`ip -brief address` lists, without http:// and port"
            ) from error
        raise ConfigError(
            f"engine: cannot listen on {host}:{port}: {error.strerror}; end what uses the port, choose another "
            f"engine.port (engines take consecutive ones), or set engine.port=null for free ports"
        ) from error
    return reserved


def _only_ipv6(host: str) -> list[str]:
    """The IPv6 addresses of a name that has no other."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    if ":" in host or any(family != socket.AF_INET6 for family, *_ in found):
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def check_ports(engine: EngineConfig) -> None:
    """Whether every engine could listen now.

    Raises:
        ConfigError: as `reserve_port`, and where the ports run out.
    """
    if engine.port is None:
        reserve_port(engine.host).close()
        return
    last = engine.port + engine.count - 1
    if last > _LAST:
        raise ConfigError(
            f"engine.port({engine.port}) + engine.count({engine.count}) - 1 = {last} is more than {_LAST}, the last "
            f"port; choose a lower one, or set engine.port=null for free ports"
        )
    for port in range(engine.port, last + 1):
        reserve_port(engine.host, port).close()
