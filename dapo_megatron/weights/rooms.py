"""Memory for buckets that come one after the other."""

from __future__ import annotations

from weakref import ref

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.weights.buckets import HOST


class Rooms:
    """Gives room for a bucket, the same again once no tensor looks at it any more, in the next push as well.

    New memory of the host costs more than what is done with it: the system hands it out page by page, with zeros. That
    of a GPU is torch's to keep.

    Args:
        device: where the memory is.
    """

    def __init__(self, device: torch.device = HOST) -> None:
        self._device = device
        self._rooms: list[tuple[np.ndarray, ref[np.ndarray]]] = []
        """Memory, and the part that was given away: that lives as long as any tensor on it, whoever made this."""

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], with whatever is there."""
        if self._device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        used = [(room, part) for room, part in self._rooms if part() is not None]
        free = [room for room, part in self._rooms if part() is None]
        room = min((room for room in free if room.nbytes >= nbytes), key=lambda room: room.nbytes, default=None)
        if room is None:  # those that are free are too small
            free, room = [], np.empty(nbytes, np.uint8)
        part = room[:nbytes]
        spare = [(other, ref(other[:0])) for other in free if other is not room]
        self._rooms = [*used, *spare, (room, ref(part))]
        return torch.from_numpy(part)
