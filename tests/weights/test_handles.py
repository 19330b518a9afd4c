from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from dapo_megatron.weights import handles
from dapo_megatron.weights.handles import CudaSharing, Handle, HandleError, open_own, open_shared, read

CUDA = torch.device("cuda", 0)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


HANDLE: dict[str, Any] = {
    "gpu": "11111111-2222",
    "memory": text(b"c" + bytes(64)),
    "nbytes": 1000,
    "offset": 512,
    "counter": text(b"/torch_12_345_6"),
    "counter_offset": 3,
    "event": text(bytes(range(64))),
    "waits": True,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "gpu_of", lambda device: HANDLE["gpu"])


def test_a_handle_is_json() -> None:
    assert asdict(read(json.loads(json.dumps(HANDLE)))) == HANDLE


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"more": 1}, "a handle has the fields gpu, memory, "),
        ({"nbytes": "1000"}, "nbytes of a handle is a int; got str"),
        ({"waits": 1}, "waits of a handle is a bool; got int"),
        ({"nbytes": True}, "nbytes of a handle is a int; got bool"),
        ({"nbytes": 0}, "nbytes above 0 and no negative offset; got nbytes=0"),
        ({"offset": -8}, "offset=-8"),
        ({"counter_offset": -1}, "counter_offset=-1"),
        ({"memory": ""}, "memory of a handle has up to 4096 bytes; got 0"),
        ({"memory": text(bytes(5000))}, "got 5000"),
        ({"memory": "no base64"}, "memory of a handle is not base64"),
        ({"event": text(bytes(63))}, "event of a handle has 64 bytes; got 63"),
        ({"counter": text(b"/../etc/passwd")}, "counter of a handle is no shared memory of torch's"),
        ({"counter": text(b"/torch_1\n")}, "counter of a handle is no shared memory of torch's"),
    ],
)
def test_what_is_no_handle_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(HandleError, match=says):
        read({**HANDLE, **changed})


@pytest.mark.usefixtures("gpu")
def test_memory_of_another_gpu_is_refused() -> None:
    with pytest.raises(HandleError, match="the memory is on GPU 3333, and this process is on 11111111-2222"):
        open_shared({**HANDLE, "gpu": "3333"}, CUDA)
    rooms = [[{**HANDLE, "gpu": "3333"}], []]
    with pytest.raises(HandleError, match="of 2 ranks, 0 have shared memory of GPU 11111111-2222"):
        open_own(rooms, CUDA)
    with pytest.raises(HandleError, match="of 2 ranks, 2 have"):
        open_own([[HANDLE], [HANDLE]], CUDA)


@pytest.mark.usefixtures("gpu")
def test_torch_is_called_as_by_its_own_way_of_handing_tensors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class OpenedError(Exception): ...

    class Storage:
        @staticmethod
        def _new_shared_cuda(*arguments: Any) -> None:
            calls.append(arguments)
            raise OpenedError

    monkeypatch.setattr(torch, "UntypedStorage", Storage)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with pytest.raises(OpenedError):
        open_shared(HANDLE, CUDA)
    memory, counter, event = (base64.b64decode(HANDLE[name]) for name in ("memory", "counter", "event"))
    with pytest.raises(OpenedError):
        rebuild_cuda_tensor(
            *(
                torch.Tensor,
                (1000,),
                (1,),
                0,
                Storage,
                torch.uint8,
                0,
                memory,
                1000,
                512,
                False,
                counter,
                3,
                event,
                True,
            )
        )
    assert calls[0] == calls[1]


def test_the_names_of_what_torch_gives_are_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_share_cuda_` as `torch.multiprocessing.reductions.reduce_tensor` unpacks it."""
    memory, counter, event = (base64.b64decode(HANDLE[name]) for name in ("memory", "counter", "event"))
    shared = (0, memory, 1000, 512, counter, 3, event, True)

    class Room:
        def untyped_storage(self) -> Any:
            return self

        def _share_cuda_(self) -> Any:
            return shared

    monkeypatch.setattr(handles, "gpu_of", lambda device: HANDLE["gpu"])
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Room())
    assert CudaSharing(CUDA).make(1000)[1] == HANDLE


@pytest.fixture
def reader() -> Iterator[Connection]:
    context = get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_read_along, args=(other,), daemon=True)
    process.start()
    yield pipe
    process.kill()
    process.join()


@pytest.mark.gpu
def test_another_process_reads_what_is_written_later(reader: Connection) -> None:
    sharing = CudaSharing(CUDA)
    rooms = [sharing.make(1 << 20) for _ in range(2)]
    reader.send([json.dumps(handle) for _, handle in rooms])
    assert reader.recv() == [1 << 20] * 2
    for value in (3, 200):
        for index, (room, _) in enumerate(rooms):
            room.fill_(value + index)
        sharing.settle()
        reader.send("sum")
        assert reader.recv() == [(value + index) << 20 for index in range(2)]


def _read_along(pipe: Connection) -> None:
    opened = [open_shared(json.loads(handle), CUDA) for handle in pipe.recv()]
    pipe.send([len(room) for room in opened])
    while pipe.recv() == "sum":
        pipe.send([int(room.sum(dtype=torch.int64)) for room in opened])


def test_every_field_is_read() -> None:
    assert set(HANDLE) == set(Handle.__dataclass_fields__)
