"""The training loop. Every rank runs it: `torchrun ... -m dapo_megatron.train CONFIG [section.key=value ...]`."""

from __future__ import annotations

from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.topology import Topology
from dapo_megatron.algo.filter import is_mixed
from dapo_megatron.algo.objective import Objective
from dapo_megatron.algo.samples import to_samples
from dapo_megatron.algo.weighing import weigh
from dapo_megatron.canary import Canary
from dapo_megatron.checkpoint.checkpoints import Checkpoints
from dapo_megatron.config import Config, OptimizerConfig, ParallelConfig
from dapo_megatron.errors import DapoError, EngineError, RolloutError
from dapo_megatron.heartbeat import Peers
from dapo_megatron.leader import Batch, Leader
from dapo_megatron.obs.lock import hold
from dapo_megatron.obs.observer import Observer
from dapo_megatron.pack import Share
from dapo_megatron.preflight import Checked
from dapo_megatron.processes import leave
from dapo_megatron.rollout.collect import collect
from dapo_megatron.rollout.engine import request_seed
from dapo_megatron.routes import LOOPBACK
from dapo_megatron.skipped import SkippedUpdates
from dapo_megatron.state import Kept, RunState
from dapo_megatron.stop import Stop, StopRequested
from dapo_megatron.supply import Supply
from dapo_megatron.types import MiniBatch
from dapo_megatron.weights.hf import HfCheckpoint
from dapo_megatron.weights.publish import open_publisher


@dataclass(frozen=True)
class Parts:
    """What a rank trains with."""

    leader: Leader | None
    actor: Actor
    reference: Actor | None
    """The frozen reference model, where the objective has a KL term."""
    hf: HfCheckpoint
    supply: Supply | None
    """What the engines sample with; None where nothing is left to sample."""
    checkpoints: Checkpoints
    skipped: SkippedUpdates
    steps_done: Kept[int]


def train(
    config: Config,
    topo: Topology,
    peers: Peers,
    obs: Observer,
    checked: Checked | None,
    opened: ExitStack,
    stop: Stop,
) -> None:
    """Run `config` to its end. Called on every rank of the job; only the leader's `obs` shows anything.

    Args:
        checked: on the leader, what `preflight` read; None elsewhere.
        opened: takes what has to be closed. Whoever called closes it, after a failure once the reason has been told.
        stop: whether the run is to end before its last step; only the leader's is ever asked.
    """
    with stop.interruptible():  # there is nothing to save yet
        parts = start(config, topo, peers, obs, checked, opened, stop)
    leader, actor, reference, steps_done = parts.leader, parts.actor, parts.reference, parts.steps_done
    objective = Objective(config.algo)

    for step in range(steps_done.value, config.train.steps):
        assert parts.supply, "a step has come after all steps"
        if peers.leader_says("stop", stop.reason is not None):
            break
        with parts.supply.sampling(step) as verified:
            with parts.supply.on_demand(stop):
                if leader:
                    leader.evaluate_due(step, stop)
                    parts.checkpoints.point_to_best()
            with obs.phase("rollout"):
                with parts.supply.on_demand(stop):
                    batch = make_batch(leader, topo.dp, step, stop) if leader else None
                if not peers.leader_says("rollout", batch is not None):
                    break
                mini_batches = receive(topo, batch, config.parallel)
        with obs.phase("logprobs"):
            mini_batches, policy = actor.with_old_logprobs(mini_batches)
            mini_batches, weighing = weigh(mini_batches, config.algo, topo)
            if reference:
                mini_batches = reference.with_ref_logprobs(mini_batches)
        with obs.phase("update"):
            lr = learning_rate(config.optimizer, step)
            results = [
                parts.skipped.seen(step, index, mini_batch, actor.update(mini_batch, objective, lr=lr))
                for index, mini_batch in enumerate(mini_batches)
            ]
        memory = obs.memory.take(topo.max)
        steps_done.value = step + 1
        if leader and batch:
            leader.log(step, batch, {**policy, **weighing, **verified, **memory}, results)
        if peers.leader_says("checkpoint", parts.checkpoints.due(step + 1)):
            with obs.phase("checkpoint"):
                parts.checkpoints.save(step + 1)
        parts.checkpoints.news()
        stop.last_checkpoint = parts.checkpoints.last

    stopping = peers.leader_says("stop", stop.reason is not None)
    over = not stopping and steps_done.value == config.train.steps
    problem = None
    if steps_done.value:
        with obs.phase("checkpoint"):
            parts.checkpoints.save(steps_done.value, export=not stopping, last=True)
            problem = parts.checkpoints.finish()
        if problem and not (over and config.run.save_hf):
            raise DapoError(problem)
    if not over:
        if leader:
            stop.saved = f"saved after {steps_done.value} steps" if steps_done.value else "no step was done"
        return
    stop.last_checkpoint = parts.checkpoints.last
    if config.run.save_hf:
        stop.left = f"the Hugging Face checkpoint in {config.run.folder / 'hf'}"
        with obs.phase("saving"):
            parts.hf.save(actor.chunks, config.run.folder / "hf", peers.after_leader)
        stop.left = None
        if problem:
            raise DapoError(f"{problem}. The trained policy is in {config.run.folder / 'hf'}")
    evaluated = parts.supply if config.samples_after(config.train.steps) else None
    if evaluated:
        evaluated.hand_over(version=config.train.steps)
    with evaluated.on_demand(stop) if evaluated else nullcontext():
        if leader:
            leader.finish(stop)
            parts.checkpoints.point_to_best()


def start(
    config: Config,
    topo: Topology,
    peers: Peers,
    obs: Observer,
    checked: Checked | None,
    opened: ExitStack,
    stop: Stop,
) -> Parts:
    """Bring up engines and actor, where the run stands: at its first step, or where its last checkpoint was."""
    leader = opened.enter_context(closing(Leader(config, obs, checked))) if checked else None
    started = False
    if leader and checked and config.engine.placement == "colocated" and config.samples_after(checked.steps_done):
        # What the actor takes while an engine measures its GPU, the engine would count as its own.
        start_engines(leader, obs)
        started = True
    started = peers.leader_says("start of the engines", started)

    with obs.phase("building the actor"):
        hf = HfCheckpoint(
            config.model.path,
            trust_remote_code=config.model.trust_remote_code,
            gathers_everywhere=config.weights.transport == "ipc",
        )
        build = partial(Actor, config, topo, hf, together=peers.together)
        actor = build()
        reference = build(trainable=False) if config.algo.kl.coef > 0 else None
    skipped = SkippedUpdates(config, topo, obs, peers.after_leader)
    state = RunState(leader.state if leader else None, skipped_in_a_row=skipped.in_a_row)
    best = leader.best if leader else lambda steps: None
    checkpoints = Checkpoints(config, topo, actor, hf, state, peers.after_leader, peers.together, obs.message, best)
    with obs.phase("restoring"):
        checkpoints.restore()
    stop.last_checkpoint = checkpoints.last
    supply = None
    if config.samples_after(state.steps_done.value):
        if not started:
            with actor.away() if config.engine.sleeps else nullcontext():
                if leader:
                    start_engines(leader, obs)
                peers.after_leader("start of the engines beside the actor")
        engines = leader.engines if leader else None
        if leader and config.weights.transport == "disk":
            opened.enter_context(closing(hold(config.weights_folder, "weights.folder", obs.message)))
        publisher = open_publisher(
            config.weights,
            hf.inventory,
            engines,
            peers.leader_says,
            together=peers.together,
            ranks=topo,
            workers=config.engine.count * config.engine.tensor_parallel,
            address=leader.engines.address if leader else LOOPBACK,
            folder=config.weights_folder,
            side_files=hf.write_side_files,
        )
        opened.enter_context(closing(publisher))
        if config.weights.verify == "full":
            prompts = checked.train if checked else ()
            publisher = Canary(publisher, config, topo, actor, leader, prompts, peers)
        supply = Supply(publisher, actor, hf, peers, engines, stop, in_turns=config.engine.sleeps, phase=obs.phase)
    obs.begin()
    return Parts(leader, actor, reference, hf, supply, checkpoints, skipped, state.steps_done)


def start_engines(leader: Leader, obs: Observer) -> None:
    """Have all engines ready, or asleep, where they take turns with the actor."""
    with obs.phase("starting engines"):
        leader.engines.wait_ready()
        if leader.config.engine.sleeps:
            leader.engines.sleep()


def make_batch(leader: Leader, replicas: int, step: int, stop: Stop) -> Batch | None:
    """On the leader: sample, grade, keep mixed groups, turn rewards into advantages, pack.

    Returns:
        None where the run is to stop: then the step has not begun.
    """
    config = leader.config
    place = leader.prompts.state_dict()
    try:
        with stop.interruptible():
            rollout = leader.engines.sample(
                collect(
                    leader.engines,
                    leader.prompts.take,
                    leader.judge,
                    config.rollout,
                    keep=is_mixed,
                    sampling=leader.sampling,
                    seeds=partial(request_seed, config.sampling_seed, step),
                    carried=leader.carried.value,
                )
            )
    except StopRequested:
        leader.prompts.load_state_dict(place)
        return None
    except (EngineError, RolloutError) as error:  # nothing to train on; what is done can be saved
        stop.ask(f"error: {error}", error.exit_code)
        leader.prompts.load_state_dict(place)
        return None
    leader.carried.value = rollout.carried
    samples = to_samples(rollout.groups, config.algo, filter_truncated=config.reward.overlong.filter)
    packed, packing = leader.pack(samples, replicas, step)
    return Batch(rollout, packing, packed)


def receive(topo: Topology, batch: Batch | None, parallel: ParallelConfig) -> list[MiniBatch]:
    """Give every rank the mini-batches of its replica. Collective: the others wait here for the leader's `batch`."""
    share = Share(*topo.scatter(batch.packed.share if batch else None))
    return share.mini_batches(sequence_multiple=parallel.sequence_multiple, total_multiple=parallel.total_multiple)


def learning_rate(optimizer: OptimizerConfig, step: int) -> float:
    """Linear warm-up over rollout steps, then constant.

    Departs from verl's scripts, whose factor starts at 0 so that the first rollout trains nothing: here step k runs
    at (k+1)/warmup_steps.
    """
    return optimizer.lr * min(1.0, (step + 1) / max(1, optimizer.warmup_steps))


if __name__ == "__main__":
    from dapo_megatron.rank import main

    leave(main())
