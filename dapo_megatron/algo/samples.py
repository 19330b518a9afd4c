"""Turns graded groups into samples that can be trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dapo_megatron.algo.advantage import group_advantages
from dapo_megatron.config import AlgoConfig
from dapo_megatron.types import Completion, Group, Prompt, TrainSample

_DDOF = {"unbiased": 1, "population": 0, "none": None}


def to_samples(groups: Sequence[Group], algo: AlgoConfig, *, filter_truncated: bool) -> list[TrainSample]:
    """Return one sample per response, in the order of the groups; all generated tokens are trained on, end tokens too.

    With `filter_truncated` (overlong filtering), truncated responses lose all their loss tokens. They still count in
    the mean and standard deviation of their group.
    """
    samples = []
    for index, group in enumerate(groups):
        advantages_G = group_advantages(group.rewards, ddof=_DDOF[algo.advantage_std], eps=algo.advantage_eps)
        for completion, advantage in zip(group.completions, advantages_G.tolist(), strict=True):
            trained = not (filter_truncated and completion.truncated)
            samples.append(_sample(group.prompt, completion, advantage, index, trained=trained))
    return samples


def _sample(prompt: Prompt, completion: Completion, advantage: float, group: int, *, trained: bool) -> TrainSample:
    token_ids = torch.tensor(prompt.token_ids + completion.token_ids, dtype=torch.int64)
    loss_mask = torch.zeros_like(token_ids, dtype=torch.bool)
    rollout_logprobs = torch.zeros_like(token_ids, dtype=torch.float32)
    if trained:
        start = len(prompt.token_ids)
        loss_mask[start:] = True
        rollout_logprobs[start:] = torch.tensor(completion.logprobs)
    return TrainSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        advantage=advantage,
        group=group,
    )
