"""The training loop. Every rank runs it: `torchrun ... -m dapo_megatron.train CONFIG [section.key=value ...]`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType

from dapo_megatron import config_file
from dapo_megatron.actor import topology
from dapo_megatron.actor.actor import Actor
from dapo_megatron.algo.objective import DapoLoss
from dapo_megatron.algo.sampler import weigh
from dapo_megatron.config import Config, OptimizerConfig
from dapo_megatron.errors import DapoError
from dapo_megatron.leader import Leader
from dapo_megatron.obs.observer import NullObserver, Observer, RunObserver
from dapo_megatron.obs.terminal import printable
from dapo_megatron.preflight import Checked, preflight
from dapo_megatron.processes import end_with_parent
from dapo_megatron.skips import SkipWatch
from dapo_megatron.weights.hf import HfCheckpoint
from dapo_megatron.weights.publish import open_publisher


def train(config: Config, obs: Observer, checked: Checked | None) -> None:
    """Run `config` to its end. Called on every rank of the job; only the leader's `obs` shows anything.

    Args:
        checked: on the leader, what `preflight` read; None elsewhere.
    """
    with ExitStack() as stack:
        topo = topology.initialize(config.parallel)
        stack.callback(topology.shutdown)
        leader = stack.enter_context(closing(Leader(config, topo, obs, checked))) if checked else None
        stack.push(_finish_undisturbed)

        with obs.phase("building the actor"):
            checkpoint = HfCheckpoint(config.model.path, trust_remote_code=config.model.trust_remote_code)
            actor = Actor(config, topo, load_weights=checkpoint.load)
            reference = None
            if config.algo.kl.coef > 0:
                reference = Actor(config, topo, load_weights=checkpoint.load, trainable=False)
        loss = DapoLoss(config.algo)
        replicas = topology.Replicas(topo)
        skips = SkipWatch(config.train.max_skipped_updates, topo, leader)

        if leader:
            leader.wait_for_engines()
        publisher = open_publisher(config.weights, leader.engines if leader else None)
        stack.callback(publisher.close)
        if leader:
            leader.evaluate("before")
        for step in range(config.train.steps):
            with obs.phase("rollout"):
                updates = topology.scatter(leader.collect(step) if leader else None, topo)
            with obs.phase("logprobs"):
                updates, policy = actor.with_old_logprobs(updates)
                updates, sampler = weigh(updates, config.algo, replicas)
                if reference:
                    updates = reference.with_ref_logprobs(updates)
            with obs.phase("update"):
                lr = learning_rate(config.optimizer, step)
                results = [
                    skips.seen(step, index, update, actor.step(update, loss, lr=lr))
                    for index, update in enumerate(updates)
                ]
            with obs.phase("publish"):
                publisher.push(checkpoint.export(actor.chunks))
            if leader:
                leader.log(step, {**policy, **sampler}, results)
                if config.eval.due(step + 1) and step + 1 < config.train.steps:
                    leader.evaluate(f"step {step + 1}")

        if config.run.save_hf:
            with obs.phase("saving"):
                checkpoint.save(actor.chunks, config.run.folder / "hf")
        if leader:
            leader.evaluate("after")
            leader.summarise()


def learning_rate(optimizer: OptimizerConfig, step: int) -> float:
    """Linear warm-up over rollout steps, then constant.

    Departs from verl's scripts, whose factor starts at 0 so that the first rollout trains nothing: here step k runs
    at (k+1)/warmup_steps.
    """
    return optimizer.lr * min(1.0, (step + 1) / max(1, optimizer.warmup_steps))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point under torchrun. Returns the exit code: 2 for input that cannot work, 1 for a run that failed."""
    path, *overrides = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    end_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    leads = rank == 0
    if not leads:  # the leader's go to its log, and say the same
        warnings.simplefilter("ignore")
    says = "dapo-megatron: error:" if leads else f"dapo-megatron: rank {rank}: error:"
    try:
        config = config_file.load(Path(path), overrides)
        checked = None
        if leads:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            checked = preflight(config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        with closing(RunObserver(config) if leads else NullObserver()) as obs:
            for warning in checked.warnings if checked else ():
                obs.message(f"warning: {warning}")
            train(config, obs, checked)
    except DapoError as error:
        print(says, printable(str(error)), file=sys.stderr, flush=True)
        return error.exit_code
    except RuntimeError as error:
        # What gloo raises when another rank is gone; that rank has said why.
        if leads or "Connection" not in str(error):
            raise
        print(f"dapo-megatron: rank {rank}: lost the connection to another rank", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if leads:
            print("dapo-megatron: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def _finish_undisturbed(kind: type[BaseException] | None, *_: object) -> None:
    """After a failure torchrun sends SIGTERM as soon as one rank is gone: do not let that replace the reason."""
    if kind is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that engines are ended and files closed on the way out."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
