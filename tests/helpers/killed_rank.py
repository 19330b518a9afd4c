"""A rank of a run whose processes, engines included, are all killed at a certain place: `PLACE CALL CONFIG ...`.

They get SIGKILL when any rank comes to the place for the CALLth time; PLACE is `nowhere` for a run that is left alone.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import psutil

PLACES = {
    "start": "dapo_megatron.rollout.engines:Engines.wait_ready",
    "evaluating": "dapo_megatron.leader:evaluate",
    "rollout": "dapo_megatron.rollout.engines:Engines.generate",
    "grading": "dapo_megatron.reward.judge:Judge.__call__",
    "logprobs": "dapo_megatron.actor.actor:Actor.with_old_logprobs",
    "update": "dapo_megatron.actor.actor:gradient_norm",
    "publishing": "dapo_megatron.weights.gloo:transmit",
    "recording": "dapo_megatron.obs.rollouts:RolloutWriter.write",
    "copying": "dapo_megatron.checkpoint.shards:ShardSaver.copy",
    "writing": "dapo_megatron.checkpoint.shards:Shards.write",
    "finishing": "dapo_megatron.checkpoint.shards:Shards.finish",
    "naming": "dapo_megatron.checkpoint.folder:complete",
    "pointing": "dapo_megatron.checkpoint.folder:point",
    "pruning": "dapo_megatron.checkpoint.folder:prune",
    "restoring": "dapo_megatron.checkpoint.checkpoints:read_shards",
}
"""What a run does there -> the function that does it, in the order in which a run comes to them for the first time."""


def kill_tree(launcher: int) -> None:
    """SIGKILL for torchrun and all its descendants, this process last."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for doomed in (process, *process.children(recursive=True)):
            if doomed.pid != os.getpid():
                with suppress(psutil.NoSuchProcess):
                    doomed.kill()


def find(place: str) -> tuple[Any, str]:
    """Return what the function of a place is an attribute of, and its name there."""
    module_name, _, path = PLACES[place].partition(":")
    *classes, name = path.split(".")
    owner = functools.reduce(getattr, classes, importlib.import_module(module_name))
    return owner, name


def kill_at(place: str, call: int) -> None:
    """Have the function of a place kill everything when it is called for the `call`th time."""
    owner, name = find(place)
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def killing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            kill_tree(os.getppid())
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, killing)


if __name__ == "__main__":
    from dapo_megatron.actor import topology
    from dapo_megatron.processes import leave

    topology.prepare()
    from dapo_megatron import rank

    if sys.argv[1] != "nowhere":
        kill_at(sys.argv[1], int(sys.argv[2]))
    leave(rank.main(sys.argv[3:]))
