from __future__ import annotations

import socket

import pytest

from dapo_megatron.config import EngineConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout.ports import check_ports, reserve_port


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            check_ports(EngineConfig(port=port))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            check_ports(EngineConfig(port=port - 1, count=2))
    check_ports(EngineConfig(port=port))


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        check_ports(EngineConfig(host="192.0.2.77"))


def test_reserved_ports_differ() -> None:
    reserved = [reserve_port("127.0.0.1") for _ in range(20)]
    assert len({one.getsockname()[1] for one in reserved}) == 20
    for one in reserved:
        one.close()


def test_a_name_with_ipv6_addresses_only_is_told_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0, 0, 0)) for address in ("fd00::5", "fd00::6")]
    monkeypatch.setattr("dapo_megatron.rollout.ports.socket.getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ConfigError, match=r"^engine.host=node6.invalid has no IPv4 address; .*: fd00::5, fd00::6$"):
        check_ports(EngineConfig(host="node6.invalid"))
