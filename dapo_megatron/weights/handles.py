"""Memory of a GPU that another process of this machine may read: CUDA IPC, as torch has it for tensors.

A handle travels as JSON. Torch's own way is a pickle, which runs what its sender wants; here each field is looked at,
and torch's constructor is called with these.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dapo_megatron.errors import EngineError

_EVENT_BYTES = 64
"""Of CUDA's handles."""
_MOST_BYTES = 4096
"""Of torch's handle to memory: CUDA's and a prefix, or what stands for an expandable segment."""
_COUNTER = re.compile(r"/torch_\w+")
"""The shared memory in which torch counts who reads."""


class HandleError(EngineError):
    """Memory that was shared cannot be opened."""


class Sharing(Protocol):
    """Makes memory that other processes can read."""

    def make(self, nbytes: int) -> tuple[Tensor, dict[str, Any]]:
        """Return uint8 [nbytes], and its handle; JSON. The memory has to stay as long as somebody may open it."""
        ...

    def settle(self) -> None:
        """Return once all that was written into the memory is there."""
        ...


@dataclass(frozen=True, slots=True)
class Handle:
    """Memory of one GPU, in torch's words (`torch.UntypedStorage._share_cuda_`); bytes are in base64."""

    gpu: str
    """UUID of the GPU, which no two have: each process numbers them in its own way."""
    memory: str
    nbytes: int
    offset: int
    """Of the memory in what CUDA shares, in bytes."""
    counter: str
    counter_offset: int
    event: str
    waits: bool
    """Whether the reader has to wait for the event."""


class CudaSharing:
    """A `Sharing` of one GPU's memory.

    Memory is shared once, when it is made: every time that torch shares it, it leaves something behind as long as the
    memory is there. One handle does for any number of readers, one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self, nbytes: int) -> tuple[Tensor, dict[str, Any]]:
        room = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        shared: Any = room.untyped_storage()._share_cuda_()
        _, memory, size, offset, counter, counter_offset, event, waits = shared
        handle = Handle(
            gpu=gpu_of(self._device),
            memory=_spell(memory),
            nbytes=size,
            offset=offset,
            counter=_spell(counter),
            counter_offset=counter_offset,
            event=_spell(event),
            waits=waits,
        )
        return room, asdict(handle)

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def open_shared(fields: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return the memory, to be read, as long as the tensor lives.

    Args:
        fields: of a `Handle`.
        device: the GPU that it is on, as this process numbers it.

    Returns:
        uint8 [nbytes].

    Raises:
        HandleError: for what is no handle, or one of another GPU.
    """
    handle = read(fields)
    if handle.gpu != gpu_of(device):
        raise HandleError(f"the memory is on GPU {handle.gpu}, and this process is on {gpu_of(device)}")
    index = torch.cuda.current_device() if device.index is None else device.index
    storage: Any = torch.UntypedStorage._new_shared_cuda(  # pyright: ignore[reportAttributeAccessIssue]
        index,
        _read(handle.memory, "memory"),
        handle.nbytes,
        handle.offset,
        _read(handle.counter, "counter"),
        handle.counter_offset,
        _read(handle.event, "event"),
        handle.waits,
    )
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def open_own(rooms: Sequence[Sequence[Mapping[str, Any]]], device: torch.device) -> list[Tensor]:
    """Open those rooms, of what all ranks have shared, that are on this process' GPU.

    Raises:
        HandleError: where there are none, or for what is no handle.
    """
    gpu = gpu_of(device)
    own = [handles for handles in rooms if any(handle.get("gpu") == gpu for handle in handles)]
    if len(own) != 1:
        raise HandleError(
            f"weights.transport=ipc: of {len(rooms)} ranks, {len(own)} have shared memory of GPU {gpu}, on which this "
            f"process is; an engine has to be on the GPUs of ranks (engine.placement=colocated), one rank on each"
        )
    return [open_shared(handle, device) for handle in own[0]]


def read(fields: Mapping[str, Any]) -> Handle:
    """Look at every field of a handle.

    Raises:
        HandleError: names the one that cannot be.
    """
    kinds: dict[str, type] = {
        **dict.fromkeys(("gpu", "memory", "counter", "event"), str),
        **dict.fromkeys(("nbytes", "offset", "counter_offset"), int),
        "waits": bool,
    }
    if set(fields) != set(kinds):
        raise HandleError(f"a handle has the fields {', '.join(kinds)}; got {', '.join(map(str, fields))}")
    for name, kind in kinds.items():
        if type(fields[name]) is not kind:
            raise HandleError(f"{name} of a handle is a {kind.__name__}; got {type(fields[name]).__name__}")
    handle = Handle(**fields)
    if handle.nbytes < 1 or handle.offset < 0 or handle.counter_offset < 0:
        raise HandleError(
            f"a handle has nbytes above 0 and no negative offset; got nbytes={handle.nbytes}, offset={handle.offset}, "
            f"counter_offset={handle.counter_offset}"
        )
    memory, event = _read(handle.memory, "memory"), _read(handle.event, "event")
    if not 0 < len(memory) <= _MOST_BYTES:
        raise HandleError(f"memory of a handle has up to {_MOST_BYTES} bytes; got {len(memory)}")
    if len(event) != _EVENT_BYTES:
        raise HandleError(f"event of a handle has {_EVENT_BYTES} bytes; got {len(event)}")
    if not _COUNTER.fullmatch(_read(handle.counter, "counter").decode("ascii", "replace")):
        raise HandleError("counter of a handle is no shared memory of torch's")
    return handle


def gpu_of(device: torch.device) -> str:
    """The UUID of a GPU."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _spell(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _read(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HandleError(f"{name} of a handle is not base64: {error}") from error
