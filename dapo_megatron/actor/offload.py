"""Takes the memory of tensors away from the device for a while, and brings it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, UntypedStorage


class Offload:
    """Keeps what `tensors` lie in in host memory between `park` and `fetch`.

    The storages themselves lose their memory and get it back, so that every view of them, in whatever object of
    Megatron's, stays what it was.

    Args:
        tensors: names them anew each time: an optimizer makes its state in its first step.
        contents: False lets go of what they hold; after `fetch` they hold anything.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, contents: bool = True) -> None:
        self._tensors, self._contents = tensors, contents
        self._parked: list[tuple[UntypedStorage, int]] = []
        self._host: dict[int, Tensor] = {}
        """Storage's address as an object -> its copy, uint8. Kept: pinning memory takes long."""

    def park(self) -> None:
        """Let the device's memory go. Parked already, it stays so."""
        if self._parked:
            return
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._tensors()}
        for key, storage in storages.items():
            if not storage.nbytes():
                continue
            if self._contents:
                host = self._host.get(key)
                if host is None or host.numel() != storage.nbytes():
                    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                    self._host[key] = host
                host.copy_(_bytes(storage), non_blocking=True)
            self._parked.append((storage, storage.nbytes()))
        self._wait()
        for storage, _ in self._parked:
            storage.resize_(0)

    def fetch(self) -> None:
        """Give the tensors their memory back. Does nothing where it was not taken."""
        for storage, size in self._parked:
            storage.resize_(size)
            if self._contents:
                _bytes(storage).copy_(self._host[storage._cdata], non_blocking=True)
        self._wait()
        self._parked.clear()

    def _wait(self) -> None:
        if any(storage.device.type == "cuda" for storage, _ in self._parked):
            torch.cuda.synchronize()


def _bytes(storage: UntypedStorage) -> Tensor:
    """Return the whole storage as a tensor, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]
