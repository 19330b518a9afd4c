"""A rank with a loop that can be stopped and trains nothing: `-m tests.helpers.stop_job SCENE CONFIG ...`.

SCENE says where it spends its time. `rollout`: the leader sleeps in what can be thrown away, the others wait for it.
`update`: the leader sleeps 2 seconds at a time in what cannot, the others wait in a collective. `hang`: that never
ends. `end`: as `update`, and the run is done when it is asked to stop. `left`: all steps are saved, and what is left
never ends. `close`: the run is over, and both ranks take 5 seconds to close.
"""

from __future__ import annotations

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
from dapo_megatron.stop import Stop, StopRequested

SCENE = sys.argv[1]


def train(
    config: Config, topo: Topology, peers: Peers, obs: Observer, checked: object, opened: ExitStack, stop: Stop
) -> None:
    stop.last_checkpoint = "the last checkpoint is step 0"
    if SCENE == "close":
        opened.callback(close, config, topo.rank)
        return
    if SCENE == "left":
        stop.left = "hf"
    (config.run.dir / f"ready{topo.rank}").touch()
    steps = 0
    while peers.leader_says("rollout", topo.is_leader and rollout(stop)):
        if topo.is_leader:
            time.sleep(600 if SCENE in ("hang", "left") else 2)
        dist.barrier(group=topo.host_world)
        steps += 1
        if SCENE == "end" and peers.leader_says("stop", stop.reason is not None):
            return
        if peers.leader_says("stop", stop.reason is not None):
            break
    dist.barrier(group=topo.host_world)
    (config.run.dir / f"saved{topo.rank}").touch()
    peers.together("saved")
    if topo.is_leader:
        stop.saved = f"saved after {steps} steps"


def close(config: Config, number: int) -> None:
    (config.run.dir / f"ready{number}").touch()
    time.sleep(5)


def rollout(stop: Stop) -> bool:
    """Whether it is whole."""
    try:
        with stop.interruptible():
            if SCENE == "rollout":
                time.sleep(600)
    except StopRequested:
        return False
    return True


if __name__ == "__main__":
    rank.train = train  # pyright: ignore[reportAttributeAccessIssue]
    leave(rank.main(sys.argv[2:]))
