"""Computes log-probs of given tokens and makes updates, in any layout of ranks.

The reduction. loss = (sum over the mini-batch's loss tokens) / N, with N counted over all micro-batches and ranks. Each
rank hands Megatron its own sum and its own count (of its own context-parallel part); gradients are summed over ranks,
and `finalize_model_grads` divides once, by the all-reduced count. Nothing is multiplied by, or divided by, a number of
ranks or micro-batches, so the gradient does not depend on how the work is split. `Actor.gradient` checks that the
divisor was the N that the mini-batch was built with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from dapo_megatron.actor.architecture import check_trains
from dapo_megatron.actor.head import RowSelection
from dapo_megatron.actor.logprobs import TokenLogprobs, vocab_parallel_logprobs
from dapo_megatron.actor.model import DTYPES, accumulate_in_main_grad, build_chunks, transformer_config
from dapo_megatron.actor.norms import ParameterNorms
from dapo_megatron.actor.offload import Offload
from dapo_megatron.actor.optimizer import (
    apply_gradient,
    build_optimizer,
    data_parallel,
    gather_parameters,
    gradient_buffers,
    gradient_norm,
    gradients_as_weights,
    optimizer_state,
)
from dapo_megatron.actor.reduce import SumOverRanks, over_ranks
from dapo_megatron.actor.schedule import Schedule
from dapo_megatron.actor.shard import Shard, concatenated, runs_of, slots_of
from dapo_megatron.actor.sharded import load_sharded_state, sharded_state
from dapo_megatron.actor.topology import Topology, process_groups
from dapo_megatron.actor.weakly import forget_graph, weakly
from dapo_megatron.config import Config
from dapo_megatron.errors import DapoError
from dapo_megatron.measures import Mean, Measure, Measures
from dapo_megatron.types import MicroBatch, MiniBatch, TokenLoss, UpdateResult

Loss = Callable[[Tensor, MicroBatch, Callable[[Tensor], Tensor]], TokenLoss]
"""(logprobs_T, micro_batch, context_sum) -> sums. Log-probs and micro-batch hold the scored slots only, under context
parallel those of this rank; context_sum adds up a tensor, and its gradient, over the ranks that share the sequences."""


class Checkpoint(Protocol):
    """What a model starts from (`weights.hf.HfCheckpoint`)."""

    @property
    def hf_config(self) -> Any: ...

    def load(self, chunks: Sequence[torch.nn.Module], together: Callable[[str], object]) -> None:
        """Fill `chunks`, the bare GPTModels of this rank, with its weights.

        Args:
            together: as the actor's own.
        """
        ...


class TokenCountError(DapoError, RuntimeError):
    """Megatron divided the gradient by another number than the mini-batch's count of loss tokens."""


class Actor:
    """One model on all ranks of a run. Every method is collective.

    Args:
        trainable: False keeps neither gradients nor optimizer, for a frozen reference.
        together: called on every rank once it has read its weights, which takes as long as its storage does; returns
            when all have come there.

    Raises:
        ConfigError: where the model is not supported or does not split into the configured layout.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        checkpoint: Checkpoint,
        *,
        trainable: bool = True,
        together: Callable[[str], object] = lambda what: None,
    ) -> None:
        self._config, self._topology = config, topology
        self._groups = process_groups()
        hf_config = checkpoint.hf_config
        check_trains(hf_config, config.parallel)
        self._vocab_size: int = hf_config.vocab_size
        self._temperature = config.rollout.temperature
        self._megatron_config: Any = transformer_config(hf_config, config.model, config.parallel, config.memory)
        chunks = build_chunks(hf_config, config.model, self._megatron_config, self._groups)
        self._chunks: list[torch.nn.Module] = list(chunks)
        checkpoint.load(self._chunks, together)
        heads = [RowSelection(chunk) for chunk in chunks if chunk.post_process]
        dtype = DTYPES[config.model.dtype]
        modules: list[Any] = list(chunks)
        if dtype is torch.bfloat16:
            modules = [Float16Module(self._megatron_config, chunk) for chunk in modules]
        self.optimizer: Any = None
        """Megatron's optimizer; None where not trainable."""
        self._divisor: Tensor | None = None
        if trainable:
            accumulate_in_main_grad(chunks)
            modules = data_parallel(self._megatron_config, config.parallel, modules, self._groups)
            self.optimizer = build_optimizer(config.optimizer, config.parallel, dtype, modules, self._groups)
            # Here all ranks are together. The next one to gather could come to ranks of which one is elsewhere.
            gather_parameters(modules)
            self._norms = ParameterNorms(self.optimizer, self._chunks)
            self._megatron_config.finalize_model_grads_func = weakly(self._finalize)
        else:
            for module in modules:
                module.requires_grad_(False)
        self._modules = modules
        self._schedule = Schedule(modules, heads, self._megatron_config, self._groups, topology, config.parallel)
        kinds = {
            "parameters": Offload(self._parameters),
            "optimizer": Offload(lambda: optimizer_state(self.optimizer, besides=self._parameters())),
            "gradients": Offload(lambda: gradient_buffers(self._modules), contents=False),
        }
        self._offloads = {name: kinds[name] for name in config.offload} if trainable else {}
        self._reference = Offload(self._parameters) if not trainable and config.memory.offload_reference else None
        if self._reference:
            self._reference.park()

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """The bare GPTModels of this rank: several where pipeline stages are virtual.

        Collective where an update has left it to the next forward pass to gather the parameters: that is done first.
        """
        if self.optimizer is not None:
            gather_parameters(self._modules)
        return self._chunks

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights as this one."""
        return self._groups.dp_cp

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Return weights and the optimizer's state as parts of global tensors, to be saved, or to be filled."""
        return sharded_state(self.chunks, self.optimizer, self._groups, loading=loading)

    def load_sharded_state(self, loaded: dict[str, Any]) -> None:
        """Go on from weights and an optimizer's state that Megatron has filled `sharded_state` with."""
        load_sharded_state(self.chunks, self.optimizer, loaded)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave the device's memory to others, inside, as far as memory.offload says."""
        self.leave()
        yield
        self.come_back()

    def leave(
        self, phase: Callable[[str], AbstractContextManager[None]] = nullcontext, *, keeping: Collection[str] = ()
    ) -> None:
        """Give up the device's memory, as far as memory.offload says. What is away already stays so. Collective.

        Args:
            phase: entered with "offload" around what moves, if anything may.
            keeping: of memory.offload, what stays.
        """
        leaving = [offload for name, offload in self._offloads.items() if name not in keeping]
        if not leaving:
            return
        with phase("offload"):
            gather_parameters(self._modules)
            for offload in leaving:
                offload.park()
            if torch.cuda.is_available():
                # torch would keep what was freed for itself, and engines are other processes.
                torch.cuda.empty_cache()

    def come_back(
        self,
        phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """Take the device's memory again, and what was in it.

        Args:
            phase: as in `leave`.
            only: of memory.offload, what comes; None for all of it.
        """
        coming = [offload for name, offload in self._offloads.items() if only is None or name in only]
        if not coming:
            return
        with phase("offload"):
            for offload in coming:
                offload.fetch()

    def with_old_logprobs(self, mini_batches: Sequence[MiniBatch]) -> tuple[list[MiniBatch], Measures]:
        """Fill old_logprobs_T, by the same micro-batches and kernels as `update`, so that the first ratio is exactly 1.

        With train.logprob_tokens, larger micro-batches are used, and it is 1 up to rounding.

        Returns:
            The mini-batches, and over all their loss tokens: entropy (nats) of the policy's next-token distribution,
            and top_prob, the probability of its most likely token.
        """

        def measure(scores: TokenLogprobs, batch: MicroBatch) -> Measures:
            assert scores.entropy_T is not None and scores.top_prob_T is not None
            mask_T = batch.loss_mask_T
            return {
                "entropy": Mean((scores.entropy_T * mask_T).sum(), mask_T.sum()),
                "top_prob": Mean((scores.top_prob_T * mask_T).sum(), mask_T.sum()),
            }

        logprobs, measures = self._evaluate(mini_batches, measure)
        return _filled(mini_batches, "old_logprobs_T", logprobs), measures

    def with_ref_logprobs(self, mini_batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Fill ref_logprobs_T with the log-probs of this model, which is the frozen reference."""
        return _filled(mini_batches, "ref_logprobs_T", self._evaluate(mini_batches, None)[0])

    def update(self, mini_batch: MiniBatch, loss: Loss, *, lr: float) -> UpdateResult:
        """Make one update, an optimizer step on a mini-batch. A mini-batch without loss tokens changes nothing.

        Where the loss, a measure of it (the ratio among them) or the gradient is not finite, on whatever rank, no rank
        changes anything, and the result says so in `skipped`.

        Returns:
            The same on every rank. Besides what the loss measures, grad_norm and, unless there was nothing to do,
            grad_norm/KIND, weight_norm/KIND and update_ratio/KIND for the kinds of parameters (`norms.KINDS`).

        Raises:
            TokenCountError: where the ranks' loss tokens do not add up to `mini_batch.loss_tokens`.
        """
        measures = self.gradient(mini_batch, loss)
        if not mini_batch.loss_tokens:
            return UpdateResult(measures, 0, lr)
        grad_norm = gradient_norm(self.optimizer)
        measures |= _means(self._norms.gradients() | {"grad_norm": grad_norm})
        skipped = self._agreed(_not_finite(measures))
        if not skipped:
            apply_gradient(self.optimizer, self._config.optimizer, lr=lr, grad_norm=grad_norm)
            measures |= _means(self._norms.updates())
        return UpdateResult(measures, mini_batch.loss_tokens, lr, skipped)

    def gradient(self, mini_batch: MiniBatch, loss: Loss) -> dict[str, Measure]:
        """Leave the gradient of a mini-batch in Megatron's buffers: do what `update` does before its step.

        Returns:
            "loss" and what the loss measures, over the whole mini-batch; the same on every rank.

        Raises:
            TokenCountError: as `update`.
        """
        for module in self._modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

        def reduce(shard: Shard, logits_1RV: Tensor) -> tuple[Tensor, Tensor, Measures]:
            result = loss(self._score(logits_1RV, shard.batch).logprobs_T, shard.batch, self._context_sum)
            mean = Mean(result.loss_sum.detach(), result.loss_tokens)
            return result.loss_sum, result.loss_tokens, {"loss": mean, **result.measures}

        self._divisor = None
        parts = self._schedule.run(mini_batch.micro_batches, reduce, forward_only=False)
        assert self._divisor is not None
        if int(self._divisor) != mini_batch.loss_tokens:
            raise TokenCountError(
                f"the gradient was divided by {int(self._divisor)} loss tokens, the sum over all ranks and "
                f"micro-batches, but the mini-batch was built with {mini_batch.loss_tokens}; either a mask "
                f"changed after packing or ranks hold micro-batches of different mini-batches"
            )
        return over_ranks(parts, self._groups, self._topology.device)

    def gradients_as_weights(self) -> AbstractContextManager[None]:
        """Let `chunks` hold, inside, what `gradient` computed last in the place of their weights, to be exported."""
        return gradients_as_weights(self._modules)

    def _context_sum(self, part: Tensor) -> Tensor:
        return SumOverRanks.apply(part, self._groups.cp) if self._topology.cp > 1 else part

    def _agreed(self, problem: str | None) -> str | None:
        """Return a problem where any rank has one, for all must make the update or skip it together."""
        flag = torch.tensor(int(problem is not None), device=self._topology.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return (problem or "something on another rank is not finite") if flag else None

    def _finalize(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Call Megatron's own and keep the count that it divided by, which it all-reduces in place."""
        finalize_model_grads(model, num_tokens, **kwargs)
        for chunk in model:
            forget_graph(chunk)
        self._divisor = num_tokens

    def _evaluate(
        self,
        mini_batches: Sequence[MiniBatch],
        measure: Callable[[TokenLogprobs, MicroBatch], Measures] | None,
    ) -> tuple[list[Tensor], Measures]:
        """Return the log-probs of every micro-batch, whole and on its device, and what `measure` finds in all."""
        batches = [batch for mini_batch in mini_batches for batch in mini_batch.micro_batches]
        parts = runs_of(batches, self._config.train.logprob_tokens)
        together = [concatenated(part) for part in parts]

        def collect(shard: Shard, logits_1RV: Tensor, non_loss_data: bool) -> tuple[Tensor, Measures]:
            scores = self._score(logits_1RV, shard.batch, with_stats=measure is not None)
            return shard.spread(scores.logprobs_T), measure(scores, shard.batch) if measure else {}

        with torch.no_grad(), self._at_hand():
            outputs = self._schedule.run(together, collect, forward_only=True)
            whole = self._whole([logprobs_t for logprobs_t, _ in outputs], together)
            measured = [measures for _, measures in outputs]
            measures = over_ranks(measured, self._groups, self._topology.device) if measure else {}
        # Copies, so that a micro-batch sent on does not carry all the others along.
        logprobs = [
            piece_T.clone()
            for part, logprobs_T in zip(parts, whole, strict=True)
            for piece_T in logprobs_T.split([batch.slots for batch in part])
        ]
        return logprobs, measures

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Bring a reference that is kept in host memory to the device for as long as it is used."""
        if self._reference is None:
            yield
            return
        self._reference.fetch()
        try:
            yield
        finally:
            self._reference.park()

    def _parameters(self) -> Iterator[Tensor]:
        return (param for chunk in self._chunks for param in chunk.parameters())

    def _score(self, logits_1RV: Tensor, batch: MicroBatch, *, with_stats: bool = False) -> TokenLogprobs:
        return vocab_parallel_logprobs(
            logits_1RV.squeeze(0),
            batch.labels_T,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
            tp_group=self._groups.tp,
            with_stats=with_stats,
        )

    def _whole(self, local: list[Tensor], batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the log-probs of whole micro-batches on every rank, from each rank's slots on the last stage."""
        cp, sizes = self._topology.cp, [batch.slots for batch in batches]
        mine = torch.cat(local) if local else torch.empty(sum(sizes) // cp, device=self._topology.device)
        if self._topology.pp > 1:
            dist.broadcast(mine, group_src=self._topology.pp - 1, group=self._groups.pp)
        if cp == 1:
            whole = list(mine.split(sizes))
        else:
            parts = [torch.empty_like(mine) for _ in range(cp)]
            dist.all_gather(parts, mine, group=self._groups.cp)
            whole = [mine.new_empty(size) for size in sizes]
            for rank, part in enumerate(parts):
                for batch, target_T, piece in zip(batches, whole, part.split([n // cp for n in sizes]), strict=True):
                    target_T[slots_of(batch.cu_seqlens, cp, rank).to(part.device)] = piece
        return [x_T.to(batch.tokens_T.device) for x_T, batch in zip(whole, batches, strict=True)]


def _filled(mini_batches: Sequence[MiniBatch], name: str, logprobs: Sequence[Tensor]) -> list[MiniBatch]:
    """Return the mini-batches with these log-probs, in order, as field `name` of their micro-batches."""
    rest = iter(logprobs)
    return [
        replace(whole, micro_batches=tuple(replace(batch, **{name: next(rest)}) for batch in whole.micro_batches))
        for whole in mini_batches
    ]


def _means(norms: Mapping[str, float]) -> dict[str, Measure]:
    return {name: Mean(norm) for name, norm in norms.items()}


def _not_finite(measures: Measures) -> str | None:
    """Name the first measure that is not finite. A mean over no tokens is nan and says nothing."""
    for name, measure in measures.items():
        if not math.isfinite(measure.value) and measure != Mean(0.0, 0.0):
            return f"{name} is {measure.value}"
    return None
