import math

import pytest
import torch

from dapo_megatron.algo.mismatch import mismatch
from dapo_megatron.measures import values


def test_means_and_maximum_over_loss_tokens():
    trainer = torch.tensor([-1.0, -2.0, 7.0], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([-1.5, -1.75, math.nan], dtype=torch.float64)
    assert values(mismatch(trainer, rollout, torch.tensor([True, True, False]))) == pytest.approx(
        {
            "mismatch/kl": (math.expm1(0.5) - 0.5 + math.expm1(-0.25) + 0.25) / 2,
            "mismatch/abs": 0.75 / 2,
            "mismatch/abs_max": 0.5,
        }
    )


def test_no_loss_tokens():
    result = values(mismatch(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([False])))
    assert result.pop("mismatch/abs_max") == 0
    assert all(map(math.isnan, result.values()))
