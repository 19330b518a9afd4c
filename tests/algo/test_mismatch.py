import math

import pytest
import torch

from dapo_megatron.algo.mismatch import mismatch


def test_sums_and_maximum_over_loss_tokens():
    trainer = torch.tensor([-1.0, -2.0, 7.0], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([-1.5, -1.75, math.nan], dtype=torch.float64)
    result = mismatch(trainer, rollout, torch.tensor([True, True, False]))
    assert result["mismatch_kl"].item() == pytest.approx(math.expm1(0.5) - 0.5 + math.expm1(-0.25) + 0.25)
    assert result["mismatch_abs"].item() == 0.75
    assert result["mismatch_abs_max"].item() == 0.5
    assert not any(value.requires_grad for value in result.values())


def test_no_loss_tokens():
    result = mismatch(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([False]))
    assert set(map(float, result.values())) == {0.0}
