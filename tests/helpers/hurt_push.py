"""A rank of a run whose pushes through a folder go wrong: `SCENE CONFIG ...`.

SCENE `full:CALL`: the disk is full from the CALLth version on. `old:NAME`: the engine of that name loads the first
version again each time, and says that all is well.
"""

from __future__ import annotations

import errno
import functools
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any


def full_from(call: int) -> None:
    from dapo_megatron.weights import versions

    write_tensors, calls = versions.write_tensors, itertools.count(1)

    @functools.wraps(write_tensors)
    def write(*args: Any) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(*args)

    versions.write_tensors = write


def loads_the_first(name: str) -> None:
    from dapo_megatron.rollout.adapters.vllm import VllmEngine

    receive = VllmEngine.receive

    @functools.wraps(receive)
    async def hurt(self: VllmEngine, info: dict[str, Any]) -> None:
        if self.name == name:
            folder = Path(info["folder"])
            first = folder.with_name("first")
            if not first.exists():
                shutil.copytree(folder, first)
            info = {**info, "folder": str(first), "checksums": None}
        await receive(self, info)

    VllmEngine.receive = hurt


if __name__ == "__main__":
    from dapo_megatron.actor import topology
    from dapo_megatron.processes import leave

    topology.prepare()
    from dapo_megatron import rank

    scene, _, detail = sys.argv[1].partition(":")
    if scene == "full":
        full_from(int(detail))
    elif scene == "old":
        loads_the_first(detail)
    leave(rank.main(sys.argv[2:]))
