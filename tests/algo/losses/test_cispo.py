import math

import pytest
import torch

from tests.helpers.losses import batch_of, f64, lose


def run(ratios, advantages, mask=None, **settings):
    """(loss, gradient by the log-probs, measures); the old policy has log-probs of -1."""
    logprobs = (f64(ratios).log() - 1).requires_grad_()
    mask = torch.tensor([True] * len(ratios) if mask is None else mask)
    batch = batch_of(f64([-1.0] * len(ratios)), f64(advantages), mask)
    result = lose(logprobs, batch, loss="cispo", cispo=settings)
    return result.loss_sum.item(), torch.autograd.grad(result.loss_sum, logprobs)[0].tolist(), result.measures


def test_the_gradient_is_the_clipped_ratio_times_the_advantage():
    loss, gradient, measures = run([1.0, 3.0, 0.2, 8.0], [1.0, -2.0, 0.5, 1.0])
    assert gradient == pytest.approx([-1.0, 6.0, -0.1, -5.0], abs=1e-12)
    # - weight * advantage * log p, with log p = log(ratio) - 1
    wanted = 1.0 + 6 * (math.log(3) - 1) - 0.1 * (math.log(0.2) - 1) - 5 * (math.log(8) - 1)
    assert loss == pytest.approx(wanted, abs=1e-12)
    assert (measures["clip/high"].value, measures["clip/low"].value) == (1 / 4, 0)


def test_a_lower_bound_where_one_is_set():
    _, gradient, measures = run([1.0, 3.0, 0.2, 8.0], [1.0, -2.0, 0.5, 1.0], clip_low=0.5, clip_high=1.0)
    assert gradient == pytest.approx([-1.0, 4.0, -0.25, -2.0], abs=1e-12)
    assert (measures["clip/high"].value, measures["clip/low"].value) == (2 / 4, 1 / 4)


def test_no_token_loses_its_gradient_to_a_clip():
    _, gradient, _ = run([1e-3, 1e3], [-1.0, 1.0])
    assert all(slope != 0 for slope in gradient)


def test_masked_tokens_add_nothing():
    loss, gradient, measures = run([2.0, 3.0], [1.0, 1.0], mask=[True, False])
    assert loss == pytest.approx(-2 * (math.log(2) - 1))
    assert gradient == pytest.approx([-2.0, 0.0])
    assert measures["ratio/mean"].value == pytest.approx(2.0)
