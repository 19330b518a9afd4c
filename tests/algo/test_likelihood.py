import math

import pytest
import torch

from dapo_megatron.algo.likelihood import likelihood_loss


def test_sum_and_gradient_over_loss_tokens_only():
    logprobs = torch.tensor([-1.0, math.nan, -0.25], dtype=torch.float64).requires_grad_()
    result = likelihood_loss(logprobs, torch.tensor([True, False, True]))
    assert result.loss_sum.item() == 1.25
    assert result.loss_sum.dtype == torch.float64
    assert result.loss_tokens == 2
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].tolist() == [-1.0, 0.0, -1.0]


def test_weights():
    logprobs = torch.tensor([-1.0, -3.0, -0.25])
    weights = torch.tensor([2.0, math.inf, 4.0])
    assert likelihood_loss(logprobs, torch.tensor([True, False, True]), weights).loss_sum.item() == 3.0


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        likelihood_loss(torch.zeros(3), torch.ones(2, dtype=torch.bool))
