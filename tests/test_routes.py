from __future__ import annotations

import pytest

from dapo_megatron import routes
from dapo_megatron.config import EngineConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout.place import leader_address
from dapo_megatron.routes import Route, address_for

WAYS = {
    "here": Route("127.0.0.1", "127.0.0.1", 0),
    "own": Route("10.0.0.1", "10.0.0.1", 0),
    "near": Route("10.0.0.1", "10.0.0.2", 0),
    "nearer": Route("10.0.0.1", "10.0.0.3", 0),
    "far": Route("192.168.0.1", "192.168.0.2", 0),
}


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(host: str) -> Route:
        if host not in WAYS:
            raise OSError("Network is unreachable")
        return WAYS[host]

    monkeypatch.setattr(routes, "find_route", find)


@pytest.mark.parametrize(
    ("hosts", "address"),
    [
        ((), "127.0.0.1"),
        (("here", "own"), "127.0.0.1"),
        (("near", "nearer"), "10.0.0.1"),
        (("here", "own", "near"), "10.0.0.1"),
    ],
)
def test_loopback_where_all_are_here_and_else_where_the_way_begins(hosts: tuple[str, ...], address: str) -> None:
    assert address_for(hosts) == {address}


def engines(*hosts: str) -> EngineConfig:
    return EngineConfig(placement="external", urls=[f"http://{host}:80" for host in hosts])


def test_engines_are_reached_by_one_address_or_refused() -> None:
    assert leader_address(EngineConfig()) == "127.0.0.1"
    assert leader_address(engines("near", "here")) == "10.0.0.1"
    with pytest.raises(ConfigError, match=r"ways to near, far go by 2 addresses .*10\.0\.0\.1, 192\.168\.0\.1"):
        leader_address(engines("near", "far"))
    assert leader_address(EngineConfig(), ["near", "here"]) == "10.0.0.1"
    with pytest.raises(ConfigError, match=r"engine\.nodes: ways to near, far go by 2 addresses"):
        leader_address(EngineConfig(), ["near", "far"])
    with pytest.raises(ConfigError, match="no way from here to one of near, nowhere: Network is unreachable"):
        leader_address(engines("near", "nowhere"))
