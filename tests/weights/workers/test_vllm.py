"""The transport as vLLM's versions see it: nothing that they want of it may be missing, else they cannot make it."""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest

from dapo_megatron.weights import workers

NAME = f"{workers.__name__}.vllm"
Init = TypeVar("Init")
Update = TypeVar("Update")


class Base25(ABC, Generic[Init, Update]):
    """The abstract methods of `WeightTransferEngine` in vLLM 0.25.1, from its
    vllm/distributed/weight_transfer/base.py.
    """

    @abstractmethod
    def init_transfer_engine(self, init_info: Any) -> None: ...

    @abstractmethod
    def start_weight_update(self) -> None: ...

    @abstractmethod
    def finish_weight_update(self) -> None: ...

    @abstractmethod
    def receive_weights(self, update_info: Any) -> None: ...

    @abstractmethod
    def shutdown(self) -> None: ...

    @staticmethod
    @abstractmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None: ...


class Registry:
    """`WeightTransferEngineFactory` as far as it is used."""

    engines: dict[str, Any]

    def __init__(self) -> None:
        self.engines = {}

    def register_engine(self, name: str, engine: Any) -> None:
        self.engines[name] = engine


def test_nothing_abstract_is_left_for_vllm_25(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    base, factory, platforms = ModuleType("base"), ModuleType("factory"), ModuleType("platforms")
    base.__dict__.update(WeightTransferEngine=Base25, WeightTransferInitInfo=object, WeightTransferUpdateInfo=object)
    factory.__dict__.update(WeightTransferEngineFactory=registry)
    platforms.__dict__.update(current_platform=SimpleNamespace(is_cpu=lambda: False))
    for package in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.base", base)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", factory)
    spec = importlib.util.find_spec(NAME)
    assert spec and spec.loader
    # Dataclasses look their module up. An import would keep it for the tests after this one.
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)
    assert {name: engine.__abstractmethods__ for name, engine in registry.engines.items()} == {
        f"dapo-{transport}": frozenset() for transport in ("gloo", "nccl", "ipc", "disk")
    }
    assert all(engine() for engine in registry.engines.values())


def test_nothing_abstract_is_left_for_the_vllm_that_is_installed() -> None:
    pytest.importorskip("vllm")
    from dapo_megatron.weights.workers import vllm
    from dapo_megatron.weights.workers.vllm import WeightTransferEngine

    wanted: frozenset[str] = WeightTransferEngine.__abstractmethods__  # type: ignore[attr-defined]
    assert "receive_weights" in wanted
    for transfer in (
        vllm.GroupWeightTransfer,
        vllm.NcclWeightTransfer,
        vllm.IpcWeightTransfer,
        vllm.DiskWeightTransfer,
    ):
        left: frozenset[str] = transfer.__abstractmethods__  # type: ignore[attr-defined]
        assert left == frozenset()


def test_a_failure_is_kept_until_it_is_asked_for_and_the_next_push_begins_anew() -> None:
    pytest.importorskip("vllm")
    from dapo_megatron.weights.workers.vllm import WorkerExtension, told_when_asked

    class Transfer:
        failure: str | None = None
        done: list[str] = []

        @told_when_asked(anew=True)
        def start_weight_update(self) -> None:
            self.done.append("start")

        @told_when_asked()
        def receive_weights(self, bucket: int) -> None:
            self.done.append(f"bucket {bucket}")
            if bucket == 2:
                raise ValueError("it is empty")

    transfer: Any = Transfer()
    worker: Any = SimpleNamespace(weight_transfer_engine=transfer)
    transfer.start_weight_update()
    for bucket in (1, 2, 3):
        transfer.receive_weights(bucket)
    assert transfer.done == ["start", "bucket 1", "bucket 2"]
    assert WorkerExtension.push_failure(worker) == "ValueError: it is empty"
    transfer.start_weight_update()
    assert WorkerExtension.push_failure(worker) is None
