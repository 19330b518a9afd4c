"""Ranks look at a checkpoint, each at a part of its files, and agree on whether it is whole."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dapo_megatron.checkpoint import folder as folders
from dapo_megatron.checkpoint.folder import BrokenCheckpointError, MissingError, UnreadableError
from dapo_megatron.convert import dist_files
from dapo_megatron.convert.dist_files import CheckpointError, UnreadableFileError
from dapo_megatron.errors import DapoError

_T = TypeVar("_T")
_LAG_SECONDS = 3.0
"""How long a shared file system may take to show a machine what another one has written."""


class Ranks(Protocol):
    """The ranks of a run, and what they tell one another through host memory (`actor.topology.Topology`)."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def host_world(self) -> dist.ProcessGroup: ...
    def broadcast(self, value: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Found:
    """What a rank has to say of a checkpoint, at most one of these."""

    broken: str | None = None
    missing: Path | None = None
    unreadable: str | None = None


def agree(
    folder: Path, ranks: Ranks, after_leader: Callable[[str], object], together: Callable[[str], object]
) -> str | None:
    """Read a checkpoint's files, each on one of the ranks, and say what is wrong with it; None if it is whole.

    Collective. What one machine cannot read, or does not see although another does, is no damage.

    Raises:
        DapoError: on all ranks, where a machine cannot tell.
    """
    found = _look(folder, ranks.rank, ranks.world_size)
    together("checkpoint checked")
    said: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(said, (socket.gethostname(), found), group=ranks.host_world)
    verdict = _judge(folder, said) if ranks.is_leader else None
    after_leader("look into the checkpoint")
    verdict = ranks.broadcast(verdict)
    if verdict.unreadable:
        raise DapoError(
            f"{verdict.unreadable}; the run does not go back to an older checkpoint for that. Mend it, start again"
        )
    return verdict.broken


def _look(folder: Path, rank: int, world_size: int) -> _Found:
    """Read the manifest, and this rank's share of the files."""
    try:
        manifest = _patiently(lambda: folders.read_manifest(folder))
        for name, file in sorted(manifest.files.items())[rank::world_size]:
            _patiently(lambda name=name, file=file: folders.check_file(folder, name, file))
    except MissingError as error:
        return _Found(missing=error.path)
    except BrokenCheckpointError as error:
        return _Found(broken=str(error))
    except UnreadableError as error:
        return _Found(unreadable=str(error))
    return _Found()


def _patiently(look: Callable[[], _T]) -> _T:
    until = time.monotonic() + _LAG_SECONDS
    while True:
        try:
            return look()
        except MissingError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _judge(folder: Path, said: Sequence[tuple[str, _Found]]) -> _Found:
    """On the leader, make one verdict of what all ranks say, and look into what Megatron will unpickle."""
    for rank, (host, found) in enumerate(said):
        where = f"rank {rank} on {host}"
        if found.unreadable:
            return _Found(unreadable=f"{where}: {found.unreadable}")
        elsewhere = [other for _, other in said if other.missing != found.missing]
        all_look = found.missing == folder / folders.MANIFEST
        if found.missing and (found.missing.exists() or (all_look and elsewhere)):
            return _Found(unreadable=f"{where} does not see {found.missing}, which other ranks do")
    for _, found in said:
        if found.missing or found.broken:
            return _Found(broken=found.broken or f"{found.missing} is missing")
    try:
        # The manifest tells what was damaged, and not who wrote it. Megatron unpickles.
        dist_files.check(folder)
    except UnreadableFileError as error:
        return _Found(unreadable=f"rank 0 on {said[0][0]}: {error}")
    except CheckpointError as error:
        return _Found(broken=str(error))
    return _Found()
