"""The policy in training: log-probs of given tokens, and optimizer steps, in any layout of ranks.

The reduction. loss = (sum over the mini-batch's loss tokens) / N, with N counted over all micro-batches and ranks. Each
rank hands Megatron its own sum and its own count (of its own context-parallel part); gradients are summed over ranks,
and `finalize_model_grads` divides once, by the all-reduced count. Nothing is multiplied by, or divided by, a number of
ranks or micro-batches, so the gradient does not depend on how the work is split. `step` checks that the divisor was the
N that the mini-batch was built with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from dapo_megatron.actor.layout import check_layout
from dapo_megatron.actor.logprobs import vocab_parallel_logprobs
from dapo_megatron.actor.model import DTYPES, build_chunks, read_hf_config, transformer_config
from dapo_megatron.actor.optimizer import GradientError, build_optimizer, data_parallel, optimizer_step
from dapo_megatron.actor.reduce import token_means
from dapo_megatron.actor.shard import Shard, make_shard, slots_of
from dapo_megatron.actor.topology import Topology
from dapo_megatron.config import Config
from dapo_megatron.errors import DapoError
from dapo_megatron.types import MicroBatch, StepResult, TokenLoss, Update

Loss = Callable[[Tensor, MicroBatch], TokenLoss]
"""(logprobs_T, micro_batch) -> sums. Under context parallel both hold this rank's slots only."""
Measure = Callable[[Tensor, MicroBatch], dict[str, Tensor]]
"""(logprobs_T, micro_batch) -> 0-d sums over loss tokens; names ending in `_max` are maxima."""


class TokenCountError(DapoError, RuntimeError):
    """Megatron divided the gradient by another number than the mini-batch's count of loss tokens."""


class Actor:
    """One model on all ranks of a run. Every method is collective.

    Args:
        load_weights: fills the bare GPTModels of this rank (`weights.hf.HfCheckpoint.load`).
        trainable: False keeps neither gradients nor optimizer, for a frozen reference.

    Raises:
        ConfigError: where the model is not supported or does not split into the configured layout.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        load_weights: Callable[[list[torch.nn.Module]], None],
        trainable: bool = True,
    ) -> None:
        self._config, self._topology = config, topology
        hf_config = read_hf_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
        check_layout(hf_config, config.parallel)
        self._vocab_size: int = hf_config.vocab_size
        self._temperature = config.rollout.temperature
        self._megatron_config: Any = transformer_config(hf_config, config.model, config.parallel)
        self._chunks: list[torch.nn.Module] = list(build_chunks(hf_config, self._megatron_config))
        load_weights(self._chunks)
        dtype = DTYPES[config.model.dtype]
        modules: list[Any] = list(self._chunks)
        self._forward_options: dict[str, Any] = {}
        if dtype is torch.bfloat16:
            modules = [Float16Module(self._megatron_config, chunk) for chunk in modules]
            self._forward_options = {"fp32_output": False}
        self.optimizer: Any = None
        """Megatron's optimizer, for checkpoints; None where not trainable."""
        self._divisor: Tensor | None = None
        if trainable:
            modules = data_parallel(self._megatron_config, config.parallel, modules)
            self.optimizer = build_optimizer(config.optimizer, config.parallel, dtype, modules)
            self._megatron_config.finalize_model_grads_func = self._finalize
        else:
            for module in modules:
                module.requires_grad_(False)
        self._modules = modules

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """The bare GPTModels of this rank: several where pipeline stages are virtual."""
        return self._chunks

    def with_old_logprobs(
        self, updates: Sequence[Update], measure: Measure | None = None
    ) -> tuple[list[Update], dict[str, float]]:
        """Fill old_logprobs_T, through the same micro-batches and kernels as `step`: the first ratio is exactly 1.

        Args:
            measure: more to sum while the log-probs are at hand, such as the distance from the sampler's.

        Returns:
            The updates, and means over all their loss tokens: entropy (nats), and what `measure` sums.
        """

        def sums(logprobs_T: Tensor, entropy_T: Tensor | None, batch: MicroBatch) -> dict[str, Tensor]:
            assert entropy_T is not None
            return {
                "entropy": (entropy_T * batch.loss_mask_T).sum(),
                **(measure(logprobs_T, batch) if measure else {}),
            }

        logprobs, means = self._evaluate(updates, sums)
        filled = iter(logprobs)
        return [
            replace(
                update,
                micro_batches=tuple(replace(batch, old_logprobs_T=next(filled)) for batch in update.micro_batches),
            )
            for update in updates
        ], means

    def with_ref_logprobs(self, updates: Sequence[Update]) -> list[Update]:
        """Fill ref_logprobs_T with the log-probs of this model, which is the frozen reference."""
        filled = iter(self._evaluate(updates, None)[0])
        return [
            replace(
                update,
                micro_batches=tuple(replace(batch, ref_logprobs_T=next(filled)) for batch in update.micro_batches),
            )
            for update in updates
        ]

    def step(self, update: Update, loss: Loss, *, lr: float) -> StepResult:
        """One optimizer step on a mini-batch. A mini-batch without loss tokens changes nothing.

        Returns:
            The same on every rank.

        Raises:
            TokenCountError: where the ranks' loss tokens do not add up to `update.loss_tokens`.
            GradientError: where the gradient is not finite. Nothing has been changed then.
        """
        for module in self._modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

        def reduce(shard: Shard, logits_1TV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logprobs_T, _ = self._logprobs(logits_1TV, shard.batch, with_entropy=False)
            result = loss(logprobs_T, shard.batch)
            return result.loss_sum, result.loss_tokens, {"loss": result.loss_sum.detach(), **result.metrics}

        self._divisor = None
        parts = self._run(update.micro_batches, reduce, forward_only=False)
        assert self._divisor is not None
        if int(self._divisor) != update.loss_tokens:
            raise TokenCountError(
                f"the gradient was divided by {int(self._divisor)} loss tokens, the sum over all ranks and "
                f"micro-batches, but the mini-batch was built with {update.loss_tokens}; either a mask changed after "
                f"packing or ranks hold micro-batches of different mini-batches"
            )
        metrics = token_means(parts, update.loss_tokens, self._topology.device)
        loss_mean = metrics.pop("loss")
        grad_norm = 0.0
        if update.loss_tokens:
            try:
                grad_norm = optimizer_step(self.optimizer, self._config.optimizer, lr)
            except GradientError as error:
                raise GradientError(f"{error}; this step: loss {loss_mean}, lr {lr}, {metrics}") from error
        return StepResult(loss_mean, grad_norm, lr, update.loss_tokens, metrics)

    def _finalize(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Megatron's own, keeping the count that it divided by: it all-reduces that in place."""
        finalize_model_grads(model, num_tokens, **kwargs)
        self._divisor = num_tokens

    def _evaluate(
        self,
        updates: Sequence[Update],
        sums: Callable[[Tensor, Tensor | None, MicroBatch], dict[str, Tensor]] | None,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Log-probs of every micro-batch (whole, on its own device) and means of what `sums` adds up."""

        def collect(shard: Shard, logits_1TV: Tensor, non_loss_data: bool) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_T, entropy_T = self._logprobs(logits_1TV, shard.batch, with_entropy=sums is not None)
            return logprobs_T, sums(logprobs_T, entropy_T, shard.batch) if sums else {}

        batches = [batch for update in updates for batch in update.micro_batches]
        with torch.no_grad():
            outputs = self._run(batches, collect, forward_only=True)
            logprobs = self._whole([logprobs_T for logprobs_T, _ in outputs], batches)
            loss_tokens = sum(update.loss_tokens for update in updates)
            parts = [part for _, part in outputs]
            means = token_means(parts, loss_tokens, self._topology.device) if sums else {}
        return logprobs, means

    def _run(self, batches: Sequence[MicroBatch], on_output: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        """Send micro-batches through the pipeline; what `on_output` gave for each, on the last stage."""
        topology = self._topology
        ranks = topology.tp if self._config.parallel.sequence_parallel else 1
        shards = [
            make_shard(
                batch,
                cp=topology.cp,
                cp_rank=topology.cp_rank,
                sequence_parallel_ranks=ranks,
                device=topology.device,
            )
            for batch in batches
        ]

        def forward_step(iterator: Iterator[Shard], module: Any) -> tuple[Tensor, Callable[..., Any]]:
            shard = next(iterator)
            tokens_1T, positions_1T = shard.batch.tokens_T[None], shard.batch.positions_T[None]
            output = module(tokens_1T, positions_1T, None, packed_seq_params=shard.packed, **self._forward_options)
            return output, partial(on_output, shard)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(shards) for _ in self._modules],
            model=self._modules,
            num_microbatches=len(shards),
            seq_length=max(batch.tokens for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _logprobs(self, logits_1TV: Tensor, batch: MicroBatch, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        tp_group: Any = mpu.get_tensor_model_parallel_group()
        return vocab_parallel_logprobs(
            logits_1TV.squeeze(0),
            batch.labels_T,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
            tp_group=tp_group,
            with_entropy=with_entropy,
        )

    def _whole(self, local: list[Tensor], batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probs of whole micro-batches on every rank, from those of this rank's slots on the last stage."""
        cp, sizes = self._topology.cp, [batch.tokens for batch in batches]
        mine = torch.cat(local) if local else torch.empty(sum(sizes) // cp, device=self._topology.device)
        if self._topology.pp > 1:
            pp_group: Any = mpu.get_pipeline_model_parallel_group()
            dist.broadcast(mine, src=mpu.get_pipeline_model_parallel_last_rank(), group=pp_group)
        if cp == 1:
            whole = list(mine.split(sizes))
        else:
            parts = [torch.empty_like(mine) for _ in range(cp)]
            cp_group: Any = mpu.get_context_parallel_group()
            dist.all_gather(parts, mine, group=cp_group)
            whole = [mine.new_empty(size) for size in sizes]
            for rank, part in enumerate(parts):
                for batch, target_T, piece in zip(batches, whole, part.split([n // cp for n in sizes]), strict=True):
                    target_T[slots_of(batch.cu_seqlens, cp, rank).to(part.device)] = piece
        # Copies, so that a micro-batch sent on does not carry all the others along.
        return [x_T.to(batch.tokens_T.device, copy=True) for x_T, batch in zip(whole, batches, strict=True)]
