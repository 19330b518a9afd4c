"""One GPU that does not exist: what computes on it runs without data, what computes on the host runs for real.

Tensors on `cuda:0` are torch's fake ones, which have shapes, dtypes and a device, and no data. Inside `fake_gpu`, torch
and Megatron see a GPU, so they take the path that they take on one, and an operation refuses tensors of two devices as
CUDA does. Everything on the host keeps its data.

A GPU computes while the host goes on, until the host wants to see a number, or copies without `non_blocking`: then it
waits. Each of these is recorded with the function that did it. What is read is data that went to the device and did not
change there; otherwise a stand-in: 1, True or, for integers, `count`.

Where a GPU does more than this: a group of NCCL takes tensors on the GPU only, one of gloo those of the host, and both
are refused here otherwise; with one rank, no collective changes anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._meta_registrations import create_fakework
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

aten, c10d, prim = torch.ops.aten, torch.ops.c10d, torch.ops.prim
GPU = torch.device("cuda", 0)
_OURS = "dapo_megatron."
_WITHOUT_META = {
    c10d.allreduce_coalesced_.default,
    c10d.allgather_into_tensor_coalesced_.default,
    c10d.reduce_scatter_tensor_coalesced_.default,
}
"""Collectives for which torch has no implementation on fake tensors."""
_READS: dict[Any, Callable[[Any], Any]] = {
    aten._local_scalar_dense.default: lambda number: number,
    aten.item.default: lambda number: number,
    aten.is_nonzero.default: bool,
}
"""Operations that give the host a number."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The host stood still until the GPU had done all that it was asked before.

    >>> str(Wait("actor.actor:gradient", "read"))
    'actor.actor:gradient read'
    """

    where: str
    """The innermost function of our package on the stack, module:function, without the package's name."""
    kind: str
    """read: a number; fetch: a copy to the host; send: a copy from it, without `non_blocking`; synchronize."""
    inside: str
    """The innermost function of ours, Megatron's or mbridge's, with the module's whole name."""

    def __str__(self) -> str:
        return f"{self.where} {self.kind}"


class DeviceError(AssertionError):
    """What would fail on a GPU, or wait in the middle of a kernel's launch."""


class FakeGpu(TorchDispatchMode):
    """Runs each operation where its tensors lie, and takes notes.

    Args:
        count: stands in for integers that are read and were computed on the GPU.
    """

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count
        self.waits: list[Wait] = []
        self.sent: list[tuple[str, int]] = []
        """Where tensors went to the GPU from, and how many bytes: blocking or not."""
        self.emptied = 0
        """How often torch was told to give back memory that it does not use."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Tensor on the GPU -> (the data that it came with, its version then)."""

    def wait(self, kind: str) -> None:
        """Note that the host waits."""
        self.waits.append(Wait(*_where(kind)))

    def empty(self) -> None:
        """Note that memory is given back."""
        self.emptied += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is prim.device.default:
            return torch.device("meta")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        here = [leaf for leaf in leaves if not isinstance(leaf, FakeTensor)]
        device = kwargs.get("device")
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, there, here)
        if not there and (device is None or device.type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _READS:
            self.wait("read")
            with unset_fake_temporarily():
                return _READS[func](self._data(there[0]).item())
        if func is aten._to_copy.default and there and device is not None and device.type == "cpu":
            return self._fetched(args[0], kwargs)
        if func is aten._to_copy.default and here:
            return self._sent(args[0], kwargs)
        if func is aten.copy_.default and there and here:
            return self._copied(*args, **kwargs)
        if mixed := [leaf for leaf in here if leaf.ndim]:
            raise DeviceError(f"{func} has tensors on the GPU and, of shape {tuple(mixed[0].shape)}, on the host")
        if device is not None and device.type == "meta":
            kwargs["device"] = GPU
        return func(*args, **kwargs)

    def _data(self, tensor: FakeTensor) -> Tensor:
        """Return what the host reads."""
        with unset_fake_temporarily():
            if known := self._known.get(tensor):
                data, version = known
                if version == tensor._version:
                    return data
            value = 1 if tensor.is_floating_point() or tensor.dtype is torch.bool else self.count
            return torch.full(tensor.shape, value, dtype=tensor.dtype)

    def _fetched(self, tensor: FakeTensor, kwargs: dict[str, Any]) -> Tensor:
        # Also with non_blocking: into pageable memory, a copy to the host always waits.
        self.wait("fetch")
        data = self._data(tensor)
        with unset_fake_temporarily():
            return data.to(dtype=kwargs.get("dtype"), copy=True)

    def _sent(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self.sent.append((_where("send")[0], tensor.nbytes))
        if not kwargs.get("non_blocking"):
            self.wait("send")
        dtype = kwargs.get("dtype") or tensor.dtype
        result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=GPU)
        with unset_fake_temporarily():
            self._known[result] = tensor.to(dtype, copy=True), result._version
        return result

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if torch.broadcast_shapes(target.shape, source.shape) != target.shape:
            raise DeviceError(f"a copy of shape {tuple(source.shape)} into {tuple(target.shape)}")
        if not non_blocking:
            self.wait("send" if isinstance(target, FakeTensor) else "fetch")
        return target

    def _collective(self, func: Any, args: Any, kwargs: Any, there: Sequence[Tensor], here: Sequence[Tensor]) -> Any:
        boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        backend = _backends.get(dist.ProcessGroup.unbox(boxed).group_name) if boxed is not None else None
        if func is c10d.barrier.default:  # its tensor is a formality, wherever it lies
            return func(*args, **kwargs)
        if (here and backend == "nccl") or (there and backend == "gloo"):
            raise DeviceError(f"{func._opname} over {backend} has tensors on the {'host' if here else 'GPU'}")
        if not there:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _WITHOUT_META:
            return create_fakework(args, return_first_arg=False)
        return func(*args, **kwargs)


def _where(kind: str) -> tuple[str, str, str]:
    """Return what a `Wait` is made of."""
    ours = inside = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and ours is None:
        module = frame.f_globals.get("__name__", "")
        name = f"{module}:{frame.f_code.co_name}"
        named = not frame.f_code.co_name.startswith("<")  # comprehensions have no frame from Python 3.12 on
        if named and inside is None and module.startswith((_OURS, "megatron.", "mbridge.")):
            inside = name
        if named and module.startswith(_OURS):
            ours = name.removeprefix(_OURS)
        frame = frame.f_back
    return ours or "elsewhere", kind, inside or "elsewhere"


_backends: dict[str, str] = {}
"""Name of a group -> the backend that it was asked for."""


@contextmanager
def fake_gpu(count: int = 1) -> Iterator[FakeGpu]:
    """Let torch see one GPU. For a process of its own: Megatron's modules keep what they saw at their import."""
    gpu = FakeGpu(count)
    with ExitStack() as stack:
        for patched in _patches(gpu):
            stack.enter_context(patched)
        for mode in (gpu.mode, gpu, _Arguments()):
            stack.enter_context(mode)
        yield gpu


class _Arguments(TorchFunctionMode):
    """Takes what torch's CPU build does not: a device as a mere number, or without one, and pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            args = tuple(GPU if arg == "cuda" else arg for arg in args)
        elif type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...


_WITHOUT_EFFECT = (
    "init",
    "_lazy_init",
    "set_device",
    "reset_peak_memory_stats",
    "manual_seed",
    "manual_seed_all",
    "set_rng_state",
)
"""Functions of torch.cuda."""


def _patches(gpu: FakeGpu) -> Iterator[AbstractContextManager[Any]]:
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *args, **kwargs: torch.Generator().get_state(),
        "default_generators": (torch.Generator(),),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: "none",
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 2**30,
        "max_memory_reserved": lambda *args: 2**31,
        "mem_get_info": lambda *args: (2**36, 2**37),
        "synchronize": lambda *args: gpu.wait("synchronize"),
        "empty_cache": gpu.empty,
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda *args: nullcontext(),
        "Event": _Event,
    }
    # One function each: torch.compile, which Megatron's modules call, refuses one under two names.
    cuda |= {name: lambda *args, **kwargs: None for name in _WITHOUT_EFFECT}
    for name, value in cuda.items():
        yield patch.object(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "current_device"):
        yield patch.object(torch.cuda.random, name, cuda[name])
    # Autograd asks a CUDA build for streams as soon as it sees the device. So C++ sees torch's device for tensors
    # without data, Python sees the GPU.
    yield patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {prim.device.default: lambda args: torch.device("meta")})
    yield patch.object(FakeTensor, "__torch_dispatch__", classmethod(_dispatch_fake))
    yield patch.object(FakeTensor, "__new__", staticmethod(_new_fake))
    yield patch.object(fake_tensor, "init_gpu_context", lambda *args: None)
    yield patch.object(torch.UntypedStorage, "device", property(_device_of_storage), create=True)
    # Else torch.tensor(..., device="cuda") would start CUDA.
    yield patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    # Torch's own way; that of fake tensors reads number by number.
    yield patch.object(FakeTensor, "tolist", lambda self: self.cpu().tolist())
    yield patch.object(FakeTensor, "is_cuda", property(lambda self: True), create=True)
    yield patch.object(torch.Tensor, "type", _type)
    yield patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(GPU, **kwargs))
    # Modules convert what they hold in its place, which a tensor without data does not let them.
    yield patch.object(torch.nn.Module, "cuda", _module_cuda)
    yield patch.object(torch.nn.Module, "bfloat16", _module_bfloat16)
    for name in ("init_process_group", "new_group"):
        yield patch.object(dist, name, _noting_backend(getattr(dist, name)))
    # Over NCCL, objects travel as bytes on the GPU, which have no data here. With one rank nothing has to travel.
    yield patch.object(dist, "all_gather_object", _all_gather_object)
    yield patch.object(dist, "broadcast_object_list", lambda *args, **kwargs: None)


_make_fake = FakeTensor.__new__
_of_fake_tensor = FakeTensor.__torch_dispatch__
_of_storage: Any = torch.UntypedStorage.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
_of_tensor = torch.Tensor.type


def _new_fake(cls: Any, mode: Any, elem: Any, device: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _make_fake(cls, mode, elem, GPU, *args, **kwargs)


def _dispatch_fake(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if func is prim.device.default:
        return torch.device("meta")
    return _of_fake_tensor(func, types, args, kwargs or {})


def _module_cuda(self: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    for module in self.modules():
        for name, param in list(module._parameters.items()):
            if param is not None and not isinstance(param, FakeTensor):
                moved = torch.nn.Parameter(param.detach().to(GPU), param.requires_grad)
                for key, value in vars(param).items():
                    setattr(moved, key, value)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(GPU)
    return self


def _module_bfloat16(self: torch.nn.Module) -> torch.nn.Module:
    wrong = {tensor.dtype for tensor in (*self.parameters(), *self.buffers())} - {torch.bfloat16}
    assert not wrong, f"the model has tensors of {wrong}, which would have to be converted and cannot be here"
    return self


def _device_of_storage(self: torch.UntypedStorage) -> torch.device:
    device = _of_storage(self)
    return GPU if device.type == "meta" else device


def _type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    answer = _of_tensor(self, *args, **kwargs)
    return answer.replace("torch.meta.", "torch.cuda.") if isinstance(answer, str) else answer


def _all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)


def _noting_backend(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make groups of torch's fake backend, and keep in mind which they should be of."""
    from torch.testing._internal.distributed import fake_pg

    assert fake_pg  # its import registers the backend

    def made(*args: Any, **kwargs: Any) -> Any:
        bound = signature(make).bind(*args, **kwargs)
        asked, bound.arguments["backend"] = bound.arguments.get("backend") or _backends["default"], "fake"
        made = make(*bound.args, **bound.kwargs)
        if made is None:  # the default group
            made, _backends["default"] = dist.group.WORLD, asked
        if isinstance(made, dist.ProcessGroup):  # this rank is a member
            _backends[made.group_name] = asked
        return made

    return made
