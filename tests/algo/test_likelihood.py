import math

import pytest
import torch

from dapo_megatron.algo.likelihood import likelihood
from tests.helpers.losses import batch_of, f64


def run(logprobs, mask, weights=None):
    nothing = torch.zeros_like(mask, dtype=torch.float64)
    return likelihood(logprobs, batch_of(nothing, nothing, mask, weights_T=weights))


def test_sum_and_gradient_over_loss_tokens_only():
    logprobs = f64([-1.0, math.nan, -0.25]).requires_grad_()
    result = run(logprobs, torch.tensor([True, False, True]))
    assert result.loss_sum.item() == 1.25
    assert result.loss_sum.dtype == torch.float64
    assert result.loss_tokens == 2
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].tolist() == [-1.0, 0.0, -1.0]


def test_weights():
    result = run(f64([-1.0, -3.0, -0.25]), torch.tensor([True, False, True]), f64([2.0, math.inf, 4.0]))
    assert result.loss_sum.item() == 3.0


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        run(torch.zeros(3), torch.ones(2, dtype=torch.bool))
