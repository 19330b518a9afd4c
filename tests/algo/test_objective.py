from dataclasses import replace

import pytest
import torch

from dapo_megatron.algo.likelihood import likelihood_loss
from dapo_megatron.algo.loss import dapo_loss
from dapo_megatron.algo.objective import DapoLoss, LikelihoodLoss
from dapo_megatron.config import AlgoConfig, KlConfig
from dapo_megatron.types import MicroBatch

LOGPROBS = torch.tensor([-1.0, -0.5, -2.0])
MASK = torch.tensor([False, True, True])
BATCH = MicroBatch(
    tokens_T=torch.tensor([3, 4, 5]),
    labels_T=torch.tensor([4, 5, 6]),
    positions_T=torch.arange(3),
    cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
    scored_T=MASK,
    loss_mask_T=MASK,
    advantages_T=torch.tensor([1.0, 1.0, -1.0]),
    weights_T=torch.tensor([1.0, 0.5, 1.5]),
    rollout_logprobs_T=torch.tensor([0.0, -0.75, -2.0]),
    groups_S=torch.tensor([0]),
    old_logprobs_T=torch.tensor([-1.0, -1.5, -5.0]),
    ref_logprobs_T=torch.tensor([-1.0, -0.25, -2.5]),
)


def test_dapo_loss_as_configured():
    config = AlgoConfig(clip_low=0.1, clip_high=0.3, dual_clip=3.0, kl=KlConfig(coef=0.5, estimator="k2"))
    expected = dapo_loss(
        LOGPROBS,
        torch.tensor([-1.0, -1.5, -5.0]),
        torch.tensor([1.0, 1.0, -1.0]),
        MASK,
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=3.0,
        weights_T=torch.tensor([1.0, 0.5, 1.5]),
        ref_logprobs_T=torch.tensor([-1.0, -0.25, -2.5]),
        kl_coef=0.5,
        kl_estimator="k2",
    )
    result = DapoLoss(config)(LOGPROBS, BATCH)
    assert result == expected
    # -1.3 at half weight, +3 at one and a half; KL 0.5 * ((-0.25)^2 / 2 * 0.5 + 0.5^2 / 2 * 1.5)
    assert result.loss_sum.item() == pytest.approx(-0.65 + 4.5 + 0.5 * (0.015625 + 0.1875))


def test_old_logprobs_are_demanded():
    with pytest.raises(AssertionError, match="old log-probs"):
        DapoLoss(AlgoConfig())(LOGPROBS, replace(BATCH, old_logprobs_T=None))


def test_likelihood_uses_mask_and_weights():
    assert LikelihoodLoss()(LOGPROBS, BATCH) == likelihood_loss(LOGPROBS, MASK, BATCH.weights_T)
    assert LikelihoodLoss()(LOGPROBS, BATCH).loss_sum.item() == 3.25
