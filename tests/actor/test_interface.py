"""Which interface gloo is told to use, on machines that are made up, and on this one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import psutil
import pytest

from dapo_megatron.actor import interface
from dapo_megatron.actor.interface import find_interface, interface_of, route
from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.routes import Route
from tests.helpers.distributed import run_distributed


class Entry(NamedTuple):
    """What psutil gives for an address of an interface; the parts that are looked at."""

    family: int
    address: str


def entries(*addresses: str) -> list[Any]:
    """An interface with these addresses; the last entry is its hardware's."""
    own = [Entry(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in addresses]
    return [*own, Entry(psutil.AF_LINK, "02:fc:00:00:00:01")]


MACHINE = {
    "lo": entries("127.0.0.1", "::1"),
    "docker0": entries("172.17.0.1"),
    "ens3": entries("10.0.0.7", "fe80::1%ens3"),
    "ib0": entries("10.9.0.7", "fd00:0:0::7"),
    "down": entries(),
}


@pytest.mark.parametrize(
    ("local", "name"),
    [("10.0.0.7", "ens3"), ("10.9.0.7", "ib0"), ("fd00::7", "ib0"), ("127.0.0.1", "lo"), ("127.0.1.1", "lo")],
)
def test_an_address_belongs_to_an_interface(local: str, name: str) -> None:
    assert interface_of(Route(local, "10.0.0.1", 0), MACHINE) == name


def test_where_an_address_alone_does_not_say_which() -> None:
    """Each interface has its own fe80:: network, and they may have the same addresses."""
    number, name = socket.if_nameindex()[-1]
    assert interface_of(Route("fe80::1", "fe80::2", number), MACHINE) == name


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at 10\.1\.1\.1, which is no address of it \(lo 127.*ens3 10.*set G"):
        interface_of(Route("10.1.1.1", "10.1.1.1", 0), MACHINE)


def test_an_address_that_lies_on_loopback_is_refused() -> None:
    """As with routing to the host: gloo, which is told a name, would listen at 127.0.0.1."""
    with pytest.raises(ConfigError, match=r"at 10\.3\.0\.1, an address of its loopback interface, lo, of which gloo"):
        interface_of(Route("10.3.0.1", "10.0.0.1", 0), {**MACHINE, "lo": entries("127.0.0.1", "10.3.0.1")})


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(ConfigError, match=r"no way from .* to MASTER_ADDR=node0\.invalid: .*set GLOO_SOCKET_IFNAME"):
        route("node0.invalid")


class Memory:
    """A store of threads."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 10)
            return self._values[key].encode()


def found(monkeypatch: pytest.MonkeyPatch, routes: Mapping[int, Route]) -> list[str]:
    """What each rank finds, on machines like MACHINE, where `node0` leads these ways."""
    mine = threading.local()
    monkeypatch.setattr(interface, "route", lambda host: routes[mine.rank])
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: MACHINE)
    store = Memory()

    def find(rank: int) -> str:
        mine.rank = rank
        return find_interface("node0", rank, len(routes), store)

    with ThreadPoolExecutor(len(routes)) as pool:
        return list(pool.map(find, range(len(routes))))


HERE = Route("127.0.0.1", "127.0.1.1", 0)


@pytest.mark.parametrize("own", [HERE, Route("10.9.0.7", "10.9.0.7", 0)], ids=["loopback", "its address"])
def test_the_machine_of_the_leader_is_found_as_others_see_it(monkeypatch: pytest.MonkeyPatch, own: Route) -> None:
    there = Route("10.0.0.7", "10.9.0.7", 0)  # by another network than the leader's machine, over a router
    assert found(monkeypatch, {0: own, 1: own, 2: there, 3: there}) == ["ib0", "ib0", "ens3", "ens3"]


def test_ranks_that_one_machine_started_one_by_one_stay_off_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, {0: HERE, 1: HERE}) == ["lo", "lo"]


def test_a_leader_behind_another_address_than_its_own_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"at 192\.0\.2\.9, which is no address of it"):
        found(monkeypatch, {0: HERE, 1: Route("10.0.0.7", "192.0.2.9", 0)})


def network_address() -> str | None:
    """An IPv4 address of this machine that is not loopback's, where it has one."""
    every = [entry for own in psutil.net_if_addrs().values() for entry in own if entry.family == socket.AF_INET]
    return next((entry.address for entry in every if not entry.address.startswith("127.")), None)


def _meet(environments: list[dict[str, str]]) -> tuple[str, str]:
    """Join a run that seems to be on two machines; return the interface that was found and what the leader said."""
    from dapo_megatron.actor import topology

    with mock.patch.dict(os.environ):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        os.environ.update(environments[int(os.environ["RANK"])])
        topo = topology.initialize(ParallelConfig())
        word = topo.broadcast("hello" if topo.is_leader else None)
        topology.shutdown()
        return os.environ["GLOO_SOCKET_IFNAME"], word


@pytest.mark.multiproc
@pytest.mark.parametrize("leader", ["127.0.0.1", None], ids=["loopback to itself", "its address"])
def test_ranks_of_several_machines_meet_on_their_network(leader: str | None) -> None:
    address = network_address()
    if address is None:
        pytest.skip("this machine has no address but loopback's")
    apart = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    machines = [{**apart, "MASTER_ADDR": leader or address}, {**apart, "MASTER_ADDR": address}]
    for name, word in run_distributed(_meet, 2, machines):
        assert name == interface_of(Route(address, address, 0)) != "lo"
        assert word == "hello"


def _chosen() -> str:
    from dapo_megatron.actor import topology

    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "1"}):
        topology.initialize(ParallelConfig())
        topology.shutdown()
        return os.environ["GLOO_SOCKET_IFNAME"]


def test_nobody_waits_for_a_rank_whose_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C._distributed_c10d import HashStore

    from dapo_megatron.actor import topology

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ens3")
    store = HashStore()
    topology._choose_interface(1, 2, store)
    assert store.get("route/1") == b""


@pytest.mark.multiproc
def test_the_users_choice_stays() -> None:
    assert run_distributed(_chosen, 2) == ["lo", "lo"]
