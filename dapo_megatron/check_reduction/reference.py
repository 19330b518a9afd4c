"""Computes what the gradient should be: Hugging Face's model in float64, one sequence at a time, formulas as printed.

Nothing here knows of Megatron, packing, masks that were moved or ranks: it shares no code with what it checks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config import AlgoConfig, Config, CorrectionConfig
from dapo_megatron.hf_folder import expert_parts
from dapo_megatron.types import TrainSample


@dataclass(frozen=True, slots=True)
class Case:
    """The samples of one mini-batch, and how they are split."""

    name: str
    samples: tuple[TrainSample, ...]
    old: tuple[Tensor, ...]
    """float32 [L] of each sample, nats: log-probs of the old policy, away from the kinks of the clipped objective."""
    ref: tuple[Tensor, ...]
    """float32 [L] of each sample, nats: log-probs of the reference."""
    budget: int
    """Slots of a micro-batch."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one mini-batch should give."""

    loss: float
    gradients: dict[str, Tensor]
    """float64, by Hugging Face's names."""


class Reference:
    """The model of a checkpoint, in Hugging Face's code: in float64 it is right, in bfloat16 it rounds as others do."""

    def __init__(self, folder: Path, config: Config, dtype: torch.dtype = torch.float64) -> None:
        from transformers import AutoModelForCausalLM

        self._config = config
        # Other implementations of experts have no float64.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
        self._model: Any = model.eval()

    def logprobs(self, sample: TrainSample) -> Tensor:
        """Return log p(token t | tokens before t) in nats, 0 for the first: float64 [L]."""
        token_ids = sample.token_ids.long()
        logits = self._model(token_ids[None, :-1]).logits[0].double() / self._config.rollout.temperature
        rest = torch.log_softmax(logits, -1).gather(-1, token_ids[1:, None])[:, 0]
        return torch.cat([rest.new_zeros(1), rest])

    def answer(self, batch: Case) -> Answer:
        """Return loss and gradients of one mini-batch at the present weights."""
        self._model.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        if loss is not None:
            loss.backward()
        gradients = {
            name: torch.zeros_like(param, dtype=torch.float64) if param.grad is None else param.grad.double()
            for name, param in self._model.named_parameters()
        }
        return Answer(0.0 if loss is None else loss.item(), as_in_files(gradients))

    def two_updates(self, first: Case, second: Case) -> dict[str, Tensor]:
        """Return the parameters after an AdamW step on each, made in float64. The model keeps them."""
        settings = self._config.optimizer
        params = list(self._model.parameters())
        masters = [param.detach().double().requires_grad_() for param in params]
        groups = [
            {"params": [p for p in masters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in masters if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        for batch in (first, second):
            self._model.zero_grad(set_to_none=True)
            loss = self._loss(batch)
            if loss is None:  # every token was masked: there is no step to make
                continue
            loss.backward()
            for master, param in zip(masters, params, strict=True):
                master.grad = param.grad.double()
            if settings.clip_grad:
                torch.nn.utils.clip_grad_norm_(masters, settings.clip_grad)
            optimizer.step()
            for master, param in zip(masters, params, strict=True):
                param.data.copy_(master.detach())
        return as_in_files({name: param.detach().double() for name, param in self._model.named_parameters()})

    def _loss(self, batch: Case) -> Tensor | None:
        """Return the loss, None where no token is left in it."""
        algo = self._config.algo
        terms: list[tuple[int, Tensor]] = []
        for sample, old, ref in zip(batch.samples, batch.old, batch.ref, strict=True):
            weights, kept = importance(old.double(), sample, algo.correction)
            if kept.any():
                policy = self.logprobs(sample)[kept]
                objective = objective_of(policy, old[kept].double(), sample.advantage, algo)
                if algo.kl.coef:
                    objective = objective - algo.kl.coef * _kl(policy - ref[kept].double(), algo.kl.estimator)
                terms.append((sample.group, weights[kept] * objective))
        return -_mean(terms, algo) if terms else None


def as_in_files(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take tensors that join all experts of a layer apart."""
    return {
        part: tensor if at is None else tensor[at.expert, at.begin : at.end]
        for name, tensor in tensors.items()
        for part, at in (expert_parts(name, tensor.shape) or {name: None}).items()
    }


def objective_of(policy: Tensor, old: Tensor, advantage: float, algo: AlgoConfig) -> Tensor:
    """Return what the configured loss maximises at each loss token of a response, [n]; log-probs float64 [n], nats."""
    reference = algo.found_loss.reference
    assert reference, f"algo.loss={algo.loss} has no reference"
    return reference(policy, old, advantage, algo.settings)


def importance(old: Tensor, sample: TrainSample, correction: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """Return the weight of each token, float64 [L], and which tokens stay in the loss, bool [L]."""
    mask = sample.loss_mask
    log_ratio = (old - sample.rollout_logprobs.double()) * mask
    if correction.level == "sequence":
        log_ratio = torch.full_like(log_ratio, log_ratio.sum().item())
    ratio = log_ratio.exp()
    match correction.kind:
        case "none":
            return torch.ones_like(ratio), mask
        case "truncated":
            return ratio.clamp(max=correction.cap), mask
        case "masked":
            low, high = correction.band
            return ratio, mask & (ratio >= low) & (ratio <= high)


def _kl(log_ratio: Tensor, estimator: str) -> Tensor:
    return log_ratio.square() / 2 if estimator == "k2" else (-log_ratio).exp() - 1 + log_ratio


def _mean(terms: Sequence[tuple[int, Tensor]], algo: AlgoConfig) -> Tensor:
    """Average over all tokens; over prompts, each the mean of its tokens; over responses; or divide by a constant."""
    if algo.loss_scope == "constant":
        assert algo.scope_length
        return torch.cat([values for _, values in terms]).sum() / (len(terms) * algo.scope_length)
    parts: dict[int, list[Tensor]] = defaultdict(list)
    for index, (group, values) in enumerate(terms):
        parts[{"token": 0, "prompt": group, "sample": index}[algo.loss_scope]].append(values)
    return torch.stack([torch.cat(values).mean() for values in parts.values()]).mean()


def errors(got: dict[str, Tensor], want: dict[str, Tensor], order: float) -> dict[str, float]:
    """Return how far each parameter is from what is wanted: the norm of the difference over that of the parameter.

    With order inf, that is the largest difference, relative to the largest entry. What should be 0 everywhere counts as
    wrong, inf, where it is not, and so does what is not finite or not in both.
    """
    result = dict.fromkeys(got.keys() ^ want.keys(), math.inf)
    for name in got.keys() & want.keys():
        value = want[name]
        off, size = (torch.linalg.vector_norm(x.flatten(), order).item() for x in (got[name].double() - value, value))
        result[name] = (off / size if size else math.inf) if off else 0.0
        if not math.isfinite(off):
            result[name] = math.inf
    return result
