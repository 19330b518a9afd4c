"""One rank's actor of a mesh of any size, built and differentiated without its memory and without the other ranks.

Tensors are torch's fake ones, which have shapes but no data, and process groups are torch's fake ones, in which a
collective ends at once and moves nothing. The rest is the real thing: `Actor.gradient` with Megatron's model, schedule,
data-parallel wrapper and optimizer. A tracker below autograd sees every operation, so it knows which storages are
alive, what matrix products cost and which collectives this rank takes part in.

The layers are those of the CPU layer spec: Transformer Engine's want a GPU. What is different with Transformer Engine:

- SwiGLU is one kernel and saves its input, [t, 2 f]. Here silu(a), b + 0 and their product are kept as well as a and b.
- RMSNorm saves its input in the dtype of the model, and what comes out goes into the next matrix product, which may
  compute it again. Here float32 copies of input and result are kept, too.
- The rotary embedding is one kernel. Here the turned halves are kept.
- Attention reads packed sequences where they lie. Here queries, keys and values are copied into padded batches, in
  float32 where sequences have up to 512 slots.
- Context parallel sends keys and values round a ring. Here they are gathered, whole, and kept so, and there is a mask
  [queries, keys] for each length of sequences.
- A weight's gradient may be added to the float32 buffer by the matrix product. Here it exists once in the dtype of the
  weight.
- On a GPU logits become log-probs in larger chunks (`actor.logprobs`).

So activations are more than with Transformer Engine. What neither side of the comparison shows: workspaces of kernels,
NCCL's buffers, the CUDA context and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoConfig

from dapo_megatron.algo.objective import Objective
from dapo_megatron.config import Config
from dapo_megatron.convert.fake_ranks import fake_ranks
from dapo_megatron.pack.microbatch import build
from dapo_megatron.types import MicroBatch, MiniBatch, TrainSample
from tests.helpers.precise_adam import precise_adam
from tests.helpers.tracker import Collective, Tracker

if TYPE_CHECKING:
    from dapo_megatron.actor.topology import Topology


@dataclass(frozen=True, slots=True)
class RankCost:
    """What one rank holds and does for one micro-batch. Sizes are bytes."""

    parameters: int
    """Numbers that this rank holds; a tied output layer on another stage than the embedding counts there too."""
    parameter_bytes: int
    """Of the parameters' buffers, their padding included."""
    gradient_bytes: int
    """Of the float32 buffers that gradients are added up in."""
    optimizer_bytes: int
    """This rank's share of Adam's two moments and, in bfloat16, of float32 copies of the parameters, or of what they
    have more than the parameters."""
    state_bytes: int
    """What was alive once the actor was built: the above without what the first step makes (moments; with
    precision_aware, all of it), and some small tensors."""
    activation_bytes: int
    """The most that was alive above the state, from the micro-batch's tensors to the end of `Actor.gradient`."""
    flops: int
    """Of matrix products, forward and backward, without attention; 2 for a multiplication with its addition."""
    collectives: tuple[Collective, ...]
    """All that `Actor.gradient` calls, the measures of the mini-batch included, in order."""
    step_collectives: tuple[Collective, ...]
    """Those of the optimizer's step: it gathers the parameters, unless parallel.overlap_param_gather leaves them to the
    next forward pass."""
    saved_bytes: int
    """Of the slices of the optimizer's state that this rank names for a checkpoint. 0 without distributed_optimizer."""
    saving_collectives: tuple[Collective, ...]
    """Those of naming all that is saved, before ranks agree on who writes what."""

    @property
    def peak_bytes(self) -> int:
        """Of a later update, where Adam's moments are there."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


class _Unloaded:
    """A checkpoint that has a config only: the parameters stay as they were allocated."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config = hf_config

    def load(self, chunks: Sequence[torch.nn.Module], together: Callable[[str], object]) -> None: ...


def fake_rank_cost(
    hf_config: Any, config: Config, *, world_size: int, rank: int, lengths: Sequence[int], micro_batches: int = 1
) -> RankCost:
    """Build the actor of a rank and take the gradient of equal micro-batches, all under fake tensors.

    The process is left as it was, except that megatron.core's modules run on the CPU from then on (`cpu.enable`).

    Args:
        hf_config: a Hugging Face config, or what its config.json says.
        lengths: slots of the sequences of a micro-batch, before padding; all of them are scored and have loss.
        micro_batches: of this rank's replica. A stage of a pipeline keeps the activations of several at a time.

    Raises:
        RuntimeError: where the process sees a GPU or has a process group.
        ConfigError: where the model is not supported or does not split into this layout.
    """
    if isinstance(hf_config, dict):
        hf_config = AutoConfig.for_model(**hf_config)
    parallel = config.parallel
    batch = _make_batch(config, lengths)
    slots = batch.slots // parallel.cp // (parallel.tp if parallel.sequence_parallel else 1)
    with ExitStack() as stack:
        topo = stack.enter_context(fake_ranks(config.parallel, world_size=world_size, rank=rank))
        for patched in _patches_for_tensors(hf_config, slots):
            stack.enter_context(patched)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return _rank_cost(hf_config, config, topo, [batch] * micro_batches, mode)


def real_rank_cost(
    hf_config: Any, config: Config, topo: Topology, *, lengths: Sequence[int], micro_batches: int = 1
) -> RankCost:
    """Measure the same with real tensors and ranks: what `fake_rank_cost` is to predict.

    Parameters keep what was in their memory, so the gradient may be anything, also nan.

    Args:
        topo: of the process group that `topology.initialize` made.
    """
    batches = [_make_batch(config, lengths)] * micro_batches
    return _rank_cost(AutoConfig.for_model(**hf_config), config, topo, batches, nullcontext())


def _make_batch(config: Config, lengths: Sequence[int]) -> MicroBatch:
    samples = [
        TrainSample(
            token_ids=torch.zeros(length + 1, dtype=torch.int32),
            loss_mask=torch.ones(length + 1, dtype=torch.bool),
            rollout_logprobs=torch.zeros(length + 1),
            advantage=1.0,
            group=0,
        )
        for length in lengths
    ]
    parallel = config.parallel
    batch = build(samples, sequence_multiple=parallel.sequence_multiple, total_multiple=parallel.total_multiple)
    zeros_T = torch.zeros(batch.slots)
    return replace(batch, old_logprobs_T=zeros_T, ref_logprobs_T=zeros_T if config.algo.kl.coef else None)


def _rank_cost(
    hf_config: Any,
    config: Config,
    topo: Topology,
    batches: Sequence[MicroBatch],
    mode: AbstractContextManager[Any],
) -> RankCost:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.optimizer import apply_gradient, optimizer_state

    mini_batch = MiniBatch(tuple(batches), topo.dp * sum(batch.loss_tokens for batch in batches))
    # The actor compares the number of tokens that it divided by, which it reads from a tensor, with the mini-batch's.
    with mode, Tracker(number=mini_batch.loss_tokens) as tracker:
        with precise_adam() if config.optimizer.precision_aware else nullcontext():
            actor = Actor(config, topo, _Unloaded(hf_config))
        parameters = [param for chunk in actor.chunks for param in chunk.parameters()]
        state = tracker.live
        tracker.restart()
        actor.gradient(mini_batch, Objective(config.algo))
        peak, flops, collectives = tracker.peak, tracker.flops, tracker.collectives
        tracker.restart()
        actor.optimizer.prepare_grads()
        apply_gradient(actor.optimizer, config.optimizer, lr=config.optimizer.lr, grad_norm=1.0)
        step_collectives = tuple(tracker.collectives)
        tracker.restart()
        slices = nested_values(actor.sharded_state().get("slices", {}))
    buffers = [buffer for module in actor._modules for buffer in module.buffers]
    # Only the distributed optimizer keeps parameters in a buffer.
    held = parameters if buffers[0].param_data is None else [buffer.param_data for buffer in buffers]
    return RankCost(
        parameters=sum(param.numel() for param in parameters),
        parameter_bytes=sum(tensor.nbytes for tensor in held),
        gradient_bytes=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer_bytes=sum(tensor.nbytes for tensor in optimizer_state(actor.optimizer, besides=parameters)),
        state_bytes=state,
        activation_bytes=peak - state,
        flops=flops,
        collectives=tuple(collectives),
        step_collectives=step_collectives,
        saved_bytes=sum(part.data.nbytes for part in slices),
        saving_collectives=tuple(tracker.collectives),
    )


def _patches_for_tensors(hf_config: Any, slots: int) -> Iterator[AbstractContextManager[Any]]:
    """Yield what has to be different for tensors without data.

    Args:
        slots: of the micro-batch on this rank.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from dapo_megatron.actor import schedule
    from dapo_megatron.actor.cpu import packing

    # Both turn the contents of small integer tensors, lengths and masks, into shapes.
    for module, name in ((schedule, "make_shard"), (packing, "_make_plan")):
        yield patch.object(module, name, _with_data(getattr(module, name)))

    # Stages tell each other the shapes of what comes. The tensors with the shapes travel and are recorded.
    communicate = P2PCommunicator._communicate_shapes

    def communicate_shapes(self: Any, *args: Any) -> list[Any]:
        return [shape and [slots, 1, hf_config.hidden_size] for shape in communicate(self, *args)]

    yield patch.object(P2PCommunicator, "_communicate_shapes", communicate_shapes)

    # Float16Module converts, and torch cannot swap the data of fake parameters. They were made in the right dtype.
    def bfloat16(module: torch.nn.Module) -> torch.nn.Module:
        wrong = {tensor.dtype for tensor in (*module.parameters(), *module.buffers())} - {torch.bfloat16}
        assert not wrong, f"the model has tensors of {wrong}, which Float16Module would convert and fake tensors cannot"
        return module

    yield patch.object(torch.nn.Module, "bfloat16", bfloat16)


def _with_data(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run
