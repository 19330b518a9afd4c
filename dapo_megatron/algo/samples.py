"""Turns graded groups into samples that can be trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dapo_megatron.algo.advantage import group_advantages
from dapo_megatron.config import AlgoConfig
from dapo_megatron.types import Completion, Group, TrainSample

_DDOF = {"unbiased": 1, "population": 0, "none": None}


def to_samples(groups: Sequence[Group], algo: AlgoConfig, *, filter_truncated: bool) -> list[TrainSample]:
    """Return one sample per response, in the order of the groups; all generated tokens are trained on, end tokens too.

    With `filter_truncated` (overlong filtering), truncated responses lose all their loss tokens. They still count in
    the mean and standard deviation of their group.
    """
    samples = []
    for index, group in enumerate(groups):
        prompt_ids = np.asarray(group.prompt.token_ids, dtype=np.int32)
        advantages_G = group_advantages(group.rewards, ddof=_DDOF[algo.advantage_std], eps=algo.advantage_eps)
        for completion, advantage in zip(group.completions, advantages_G.tolist(), strict=True):
            trained = not (filter_truncated and completion.truncated)
            samples.append(_sample(prompt_ids, completion, advantage, index, trained=trained))
    return samples


def _sample(
    prompt_ids: np.ndarray, completion: Completion, advantage: float, group: int, *, trained: bool
) -> TrainSample:
    token_ids = np.concatenate([prompt_ids, np.asarray(completion.token_ids, dtype=np.int32)])
    loss_mask = np.zeros(token_ids.shape, dtype=np.bool_)
    rollout_logprobs = np.zeros(token_ids.shape, dtype=np.float32)
    if trained:
        loss_mask[len(prompt_ids) :] = True
        rollout_logprobs[len(prompt_ids) :] = completion.logprobs
    return TrainSample(
        token_ids=torch.from_numpy(token_ids),
        loss_mask=torch.from_numpy(loss_mask),
        rollout_logprobs=torch.from_numpy(rollout_logprobs),
        advantage=advantage,
        group=group,
    )
