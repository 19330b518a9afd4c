"""Measures how much memory each phase of a step takes at its peak, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dapo_megatron.measures import Max, Measure, reduce
from dapo_megatron.obs.metrics import PHASES

if TYPE_CHECKING:  # what is shown of a run starts without torch
    from torch import Tensor

_GIB = 2**30


class _Gauge(Protocol):
    """Where peaks are read. All values in bytes."""

    def reset(self) -> None:
        """Forget the peak so far: from here on it is what is in use now, or more."""
        ...

    def peak(self) -> int: ...

    def besides(self) -> dict[str, int]:
        """Other values as they are now, by the end of their metric's name."""
        ...


class PeakMemory:
    """The peaks of this process: on CUDA what torch has allocated on its device, on CPU what is resident.

    Where the system does not tell, there are no peaks.
    """

    def __init__(self) -> None:
        self._gauge = _open_gauge()
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what goes on inside, if it is one of `metrics.PHASES`. A phase may come several times in a step."""
        if self._gauge is None or name not in PHASES:
            yield
            return
        self._gauge.reset()
        yield
        for key, size in {name: self._gauge.peak(), **self._gauge.besides()}.items():
            self._peaks[key] = max(size / _GIB, self._peaks.get(key, 0.0))

    def take(self, largest: Callable[[Tensor], Tensor] | None = None) -> dict[str, Measure]:
        """Return `memory/PHASE` and the like in GiB since this was called last. Collective where `largest` is.

        Args:
            largest: takes the largest over ranks of each entry of a float64 tensor; None for a single rank.
        """
        peaks, self._peaks = self._peaks, {}
        return reduce([{f"memory/{key}": Max(size) for key, size in peaks.items()}], largest=largest) if peaks else {}


class _Cuda:
    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def reset(self) -> None:
        self._cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return self._cuda.max_memory_allocated()

    def besides(self) -> dict[str, int]:
        free, total = self._cuda.mem_get_info()
        return {"reserved": self._cuda.max_memory_reserved(), "device": total - free}


class _Resident:
    """Linux keeps the peak of what is resident, and forgets it when asked (proc(5), /proc/pid/clear_refs)."""

    _CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def reset(self) -> None:
        self._CLEAR.write_text("5")

    def peak(self) -> int:
        line = next(line for line in self._STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def besides(self) -> dict[str, int]:
        return {}


def _open_gauge() -> _Gauge | None:
    import torch

    if torch.cuda.is_available():
        return _Cuda()
    gauge = _Resident()
    try:
        gauge.reset()
        gauge.peak()
    except (OSError, StopIteration):  # another system, or a container that keeps /proc from its processes
        return None
    return gauge
