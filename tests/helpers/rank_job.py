"""A rank under torchrun that does something else than training: `-m tests.helpers.rank_job SCENE CONFIG ...`.

SCENE says what each rank does once all of them are there: leader,other[,other ...], the last one for all that follow.
`collective` waits in one for the others, `python` sleeps, `native` hears no signal, `waiting` waits for the leader,
`raise` fails. With `hang` or `fail`, closing does that; with `slow`, the leader starts 8 seconds after the others.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import ExitStack

import torch.distributed as dist

from dapo_megatron import rank
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.heartbeat import Peers
from dapo_megatron.obs.observer import Observer
from dapo_megatron.processes import leave
from dapo_megatron.stop import Stop

SCENE = sys.argv[1].split(",")
ACTS = [word for word in SCENE if word not in ("hang", "fail", "slow")]


def act(
    config: Config, topo: Topology, peers: Peers, obs: Observer, checked: object, opened: ExitStack, stop: Stop
) -> None:
    if topo.is_leader:
        opened.callback(close)
    (config.run.dir / f"ready{topo.rank}").touch()
    while len(list(config.run.dir.glob("ready*"))) < topo.world_size:
        time.sleep(0.05)
    match ACTS[min(topo.rank, len(ACTS) - 1)]:
        case "collective":
            dist.barrier(group=topo.host_world)
        case "native":  # a call that hears no signal, as a wait for the GPU is
            lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            libc.pthread_mutex_lock(lock)
            libc.pthread_mutex_lock(lock)
        case "python":
            time.sleep(600)
        case "waiting":
            peers.after_leader("rollout")
        case "raise":
            time.sleep(1)
            raise ArithmeticError("the one that matters")
        case "end":
            pass


def close() -> None:
    print("closing: this is for the log")
    if "hang" in SCENE:
        time.sleep(600)
    if "fail" in SCENE:
        raise OSError("closing failed")


if __name__ == "__main__":
    rank.train = act  # pyright: ignore[reportAttributeAccessIssue]
    rank.CLOSE_SECONDS = 3.0  # pyright: ignore[reportPrivateImportUsage]
    if "slow" in SCENE and os.environ["RANK"] == "0":
        time.sleep(8)
    leave(rank.main(sys.argv[2:]))
