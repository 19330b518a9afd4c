"""Saves the whole of a run, and brings it back."""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from safetensors.torch import load, save
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron import __version__
from dapo_megatron.checkpoint import folder as folders
from dapo_megatron.checkpoint.agreement import Ranks, agree
from dapo_megatron.checkpoint.folder import File, Manifest
from dapo_megatron.checkpoint.random_states import random_states, restore_random_states
from dapo_megatron.checkpoint.shards import Shards, ShardSaver, read_shards
from dapo_megatron.config import Config
from dapo_megatron.convert import dist_files
from dapo_megatron.errors import DapoError

log = logging.getLogger(__name__)

STATE = "state.json"
RANDOM = "random.safetensors"
SIDE_FILES = "hf"
_WRITING = timedelta(days=30)
"""How long the ranks' writers wait for one another: as long as storage takes. Whoever dies meanwhile ends the run."""
_REMIND_SECONDS = 60.0
_NICENESS = 10
"""Of a writer. A step that computes beside it has ten times its share of a core."""
"""After which the leader's log says that a checkpoint is still being written; then after twice as long, and so on."""


class Trained(Protocol):
    """What is trained (`actor.actor.Actor`)."""

    @property
    def chunks(self) -> list[torch.nn.Module]: ...

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights as this one."""
        ...

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]: ...

    def load_sharded_state(self, loaded: dict[str, Any], /) -> None: ...


class Exporter(Protocol):
    """Knows the model as a Hugging Face checkpoint (`weights.hf.HfCheckpoint`)."""

    def copy_side_files(self, folder: Path, dtype: torch.dtype, /) -> None: ...

    def save(self, chunks: Sequence[torch.nn.Module], folder: Path, after_leader: Callable[[str], object]) -> None: ...


class State(Protocol):
    """What a run keeps besides weights and optimizer (`state.RunState`)."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank's writer tells the leader's."""

    results: list[Any]
    files: dict[str, File]
    error: str | None


class Checkpoints:
    """The checkpoints of a run. Methods are collective, unless they say otherwise.

    Args:
        after_leader: what the others wait with for work that only the leader does.
        together: what all wait with for the last of them.
        tell: on the leader, shows a line to the person who runs this.
        best: on the leader, of steps that have a checkpoint, the one to keep for good; None without any. It is called
            on another thread as well.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        trained: Trained,
        exporter: Exporter,
        state: State,
        after_leader: Callable[[str], object] = lambda what: None,
        together: Callable[[str], object] = lambda what: None,
        tell: Callable[[str], None] = lambda text: None,
        best: Callable[[Collection[int]], int | None] = lambda steps: None,
    ) -> None:
        self._config, self._settings = config, config.checkpoint
        self._root = config.run.folder / "checkpoints"
        self._ranks, self._trained, self._exporter, self._state = ranks, trained, exporter, state
        self._after_leader, self._together, self._tell, self._best = after_leader, together, tell, best
        self._pointing = Lock()
        # The writers' own: the main threads go on with collectives of theirs meanwhile.
        self._writers: Any = dist.new_group(backend="gloo", timeout=_WRITING)
        # Who has written, for the leader to name those who have not.
        self._board: Any = distributed_c10d.PrefixStore("checkpoint", distributed_c10d._get_default_store())
        self._board.set(f"host of {ranks.rank}", socket.gethostname())
        self._saver = ShardSaver(trained.replicas, ranks.host_world)
        self._life = str(ranks.broadcast(secrets.token_hex(4)))
        self._thread: Thread | None = None
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed: str | None = None
        self.last = "there is no checkpoint"
        """On the leader, which checkpoint is the last good one, for people."""
        self.saved_step = 0
        """Of the last checkpoint that was begun or read, the same on all ranks; 0 before there is any."""
        self._saved_at = time.monotonic()

    def restore(self) -> int | None:
        """Go on from the best checkpoint there is: the one that `latest` names, or the one before where it is broken.

        Returns:
            Its step, None where there is none yet.

        Raises:
            DapoError: where there are checkpoints and all of them are broken, or one does not fit this run.
        """
        found: list[Path] = []
        problem: str | None = None
        if self._ranks.is_leader:
            folders.clear(self._root)
            found, problem = folders.candidates(self._root)
            if problem and found:
                self._tell(f"warning: {problem}; going on from {found[0].name}")
        self._after_leader("look for checkpoints")
        found, problem = self._ranks.broadcast((found, problem))
        if problem and not found:
            raise DapoError(
                f"{problem}, nor any other in that folder: is its storage there? A run does not begin anew for that; "
                f"put a checkpoint back, or start with run.existing=rename to begin anew"
            )
        for place, folder in enumerate(found):
            broken = agree(folder, self._ranks, self._after_leader, self._together)
            if broken is None:
                self._load(folder)
                self._set_aside()
                return self.saved_step
            following = found[place + 1].name if place + 1 < len(found) else "none: there is no other"
            self._tell(f"warning: checkpoint {folder.name} is broken: {broken}; taking {following}")
        if found:
            raise DapoError(
                f"none of the {len(found)} checkpoints in {self._root} can be read; the lines above say what is wrong "
                f"with each. Put one back from a copy, or move the folder away to begin anew"
            )
        return None

    def due(self, step: int) -> bool:
        """Return whether to save after `step` steps are done. Asked on the leader; not collective."""
        minutes = self._settings.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= minutes * 60
        return self._settings.due(step) or late

    def save(self, step: int, *, export: bool = True, last: bool = False) -> None:
        """Save the run after `step` steps. Returns once this rank's part is copied, or with asynchronous=False written.

        What cannot be written is told by `news`, and does not end the run. What is saved already is not saved again.

        Args:
            export: False leaves out checkpoint.export_hf, for which the ranks wait.
            last: no other follows: `finish` says what cannot be written.
        """
        self._wait()
        self._after_leader("checkpoint before this one")
        failed = self._ranks.broadcast(self._failed)
        if step == self.saved_step and not failed:
            return
        shards = self._saver.copy(self._trained.sharded_state())
        contents, problem = self._small_files()
        unfinished = folders.unfinished(self._root, step, self._life)
        export = export and self._settings.export_hf
        exported = Event()
        self.saved_step, self._saved_at = step, time.monotonic()
        self._failed = f"checkpoint of step {step}: its writer did not come to its end"
        self._thread = Thread(
            target=self._write, args=(step, shards, contents, unfinished, problem, exported, last), daemon=True
        )
        self._thread.start()
        try:
            if export:
                self._export(step, unfinished)
        finally:
            exported.set()
        if not self._settings.asynchronous:
            self._wait()
            self._after_leader("checkpoint")

    def news(self) -> None:
        """Tell what writers have come to since. Not collective."""
        while not self._news.empty():
            self._tell(self._news.get())

    def point_to_best(self) -> int | None:
        """On the leader, have `best` name the best checkpoint, where one is to be kept, and return its step.

        Not collective. What cannot be written is told by `news`.
        """
        if self._settings.keep_best is None:
            return None
        with self._pointing:
            best = self._best(folders.complete_steps(self._root).keys())
            try:
                folders.point(self._root, folders.BEST, step=best)
            except OSError as error:
                self._news.put(f"warning: {self._root / folders.BEST} could not be written: {error}")
        return best

    def finish(self) -> str | None:
        """Wait until the last checkpoint is written. Returns, on all ranks, why it could not be."""
        self._wait()
        self._after_leader("last checkpoint")
        self.news()
        failed = self._ranks.broadcast(self._failed)
        return failed and f"{failed}; once that is mended, start the run again with run.existing=resume"

    def _wait(self) -> None:
        """Wait for this rank's writer.

        Raises:
            DapoError: on the leader, where it takes longer than checkpoint.write_seconds.
        """
        pause = _REMIND_SECONDS
        until = self._saved_at + self._settings.write_seconds
        while self._thread:
            self._thread.join(min(pause, max(until - time.monotonic(), 0.1)))
            if not self._thread.is_alive():
                self._thread = None
            elif self._ranks.is_leader:
                self._remind(over=time.monotonic() >= until)
                pause *= 2

    def _remind(self, *, over: bool) -> None:
        ranks = range(self._ranks.world_size)
        late = [rank for rank in ranks if not self._board.check([f"{self.saved_step} written by {rank}"])]
        names = [f"rank {rank} on {self._board.get(f'host of {rank}').decode()}" for rank in late[:8]]
        whom = f"by {', '.join(names)}{', ...' if late[8:] else ''}" if late else "together"
        seconds = f"{time.monotonic() - self._saved_at:.0f} s"
        said = f"the checkpoint of step {self.saved_step} is still being written {whom}, after {seconds}"
        if over:
            raise DapoError(
                f"{said}, checkpoint.write_seconds; {self.last}. Look at the storage of {self._root} there, and start "
                f"again with run.existing=resume"
            )
        log.warning("%s", said)

    def _small_files(self) -> tuple[dict[str, bytes], str | None]:
        """Return, on the leader, what lies beside the shards, by name, and why that is not to be had."""
        states: list[Any] | None = [None] * self._ranks.world_size if self._ranks.is_leader else None
        dist.gather_object(random_states(), states, dst=0, group=self._ranks.host_world)
        if states is None:
            return {}, None
        tensors = {f"rank{rank}.{name}": tensor for rank, state in enumerate(states) for name, tensor in state.items()}
        try:
            state = json.dumps(self._state.state_dict())
        except OSError as error:  # the record of the run must be on the disk before
            return {}, folders.why(error, self._config.run.folder)
        return {STATE: state.encode(), RANDOM: save(tensors)}, None

    def _export(self, step: int, unfinished: Path) -> None:
        try:
            self._exporter.save(self._trained.chunks, unfinished / SIDE_FILES, self._after_leader)
        except DapoError as error:  # on the leader, which writes
            shutil.rmtree(unfinished / SIDE_FILES, ignore_errors=True)
            self._news.put(f"warning: checkpoint of step {step}: no Hugging Face checkpoint beside it: {error}")
        self._after_leader("Hugging Face checkpoint")

    def _write(
        self,
        step: int,
        shards: Shards,
        contents: dict[str, bytes],
        unfinished: Path,
        problem: str | None,
        exported: Event,
        last: bool,
    ) -> None:
        """Write this rank's part and, on the leader, make it a checkpoint once all have. In a thread of its own."""
        _step_back()
        started, size = time.monotonic(), 0
        try:
            written = self._write_part(shards, unfinished)
            self._board.set(f"{step} written by {self._ranks.rank}", "")
            parts: list[Any] | None = [None] * self._ranks.world_size if self._ranks.is_leader else None
            dist.gather_object(written, parts, dst=0, group=self._writers)
            exported.wait()
            if parts is None:
                self._failed = None
                return
            errors = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error]
            problem = problem or ", ".join(errors[:3])
            size = sum(file.bytes for part in parts for file in part.files.values())
            if not problem:
                self._complete(step, shards, contents, unfinished, parts)
        except Exception as error:  # whatever the disk does to the libraries that write to it
            problem = folders.why(error, self._root)
            log.debug("checkpoint of step %d", step, exc_info=True)
        if problem:
            shutil.rmtree(unfinished, ignore_errors=True)
            self._failed = f"checkpoint of step {step} could not be written: {problem}; {self.last}"
            if not last:
                self._news.put(f"warning: {self._failed}, and the next one is tried when it is due")
            return
        self._failed, self.last = None, f"the last checkpoint is {self._root / f'step-{step}'}"
        self._news.put(f"checkpoint step-{step}: {size:,} bytes in {time.monotonic() - started:.1f} s")
        try:
            best = self.point_to_best()
            keep_last, keep_every = self._settings.keep_last, self._settings.keep_every
            folders.prune(self._root, keep_last=keep_last, keep_every=keep_every, best=best)
        except OSError as error:
            self._news.put(f"warning: {self._root}: an old checkpoint could not be deleted: {error}")

    def _write_part(self, shards: Shards, unfinished: Path) -> _Written:
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            results = shards.write(unfinished)
            names = sorted({result.storage_data.relative_path for result in results})
            return _Written(results, {name: folders.describe(unfinished / name) for name in names}, None)
        except Exception as error:  # whatever the disk does to the libraries that write to it
            return _Written([], {}, folders.why(error, self._root, shards.nbytes))

    def _complete(
        self, step: int, shards: Shards, contents: dict[str, bytes], unfinished: Path, parts: Sequence[_Written]
    ) -> None:
        dtype = self._config.model.dtype
        shards.finish(unfinished, [part.results for part in parts])
        folders.write_files(unfinished, contents)
        if not (unfinished / SIDE_FILES / "config.json").exists():
            (unfinished / SIDE_FILES).mkdir(exist_ok=True)
            self._exporter.copy_side_files(unfinished / SIDE_FILES, getattr(torch, dtype))
        files = {name: file for part in parts for name, file in part.files.items()}
        others = {str(path.relative_to(unfinished)) for path in unfinished.rglob("*") if path.is_file()} - files.keys()
        files |= {name: folders.describe(unfinished / name) for name in sorted(others)}
        manifest = Manifest(
            step=step,
            world_size=self._ranks.world_size,
            parallel=self._layout,
            dtype=dtype,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            dapo_megatron=__version__,
            files=files,
        )
        folders.complete(unfinished, manifest)

    @property
    def _layout(self) -> dict[str, Any]:
        return self._config.parallel.model_dump(mode="json")

    def _set_aside(self) -> None:
        if not self._ranks.is_leader:
            return
        for moved in folders.supersede(self._root, self.saved_step):
            self._tell(f"{moved}: the run goes on from an earlier step than this one; delete it if nobody wants it")

    def _load(self, folder: Path) -> None:
        manifest = folders.read_manifest(folder)
        state: Any = None
        if self._ranks.is_leader:
            state = json.loads((folder / STATE).read_bytes())
            self._state.load_state_dict(state)
            state = {**state, "leader": None}
        self._after_leader("state of the run")
        state = self._ranks.broadcast(state)
        if not self._ranks.is_leader:
            self._state.load_state_dict(state)
        try:
            objects = dist_files.DistReader(folder).objects
            loaded = read_shards(self._trained.sharded_state(loading=True), folder, self._trained.replicas, objects)
        except (KeyError, ValueError, CheckpointingException, CheckpointException) as error:
            raise DapoError(f"checkpoint {folder} does not fit this run: {_said(error)}") from error
        self._trained.load_sharded_state(loaded)
        if (manifest.world_size, manifest.parallel) == (self._ranks.world_size, self._layout):
            prefix = f"rank{self._ranks.rank}."
            states = load((folder / RANDOM).read_bytes())
            mine = {name.removeprefix(prefix): tensor for name, tensor in states.items() if name.startswith(prefix)}
            restore_random_states(mine)
        self.saved_step, self.last = manifest.step, f"the last checkpoint is {folder}"


def _step_back() -> None:
    """Have the thread that calls this compute when others do not: on a CPU, the ranks and their step come first."""
    if sys.platform == "linux":  # elsewhere, threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _said(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()
