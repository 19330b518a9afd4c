import math

import pytest
import torch

from dapo_megatron.algo.objective import Objective
from dapo_megatron.config import AlgoConfig
from dapo_megatron.measures import values
from tests.helpers.losses import batch_of, f64, lose

WIDE = {"loss": "gspo", "gspo": {"clip_low": 0.2, "clip_high": 0.25}}
# Two responses, of two and three tokens: mean ratios sqrt(2 * 0.72) = 1.2 and cbrt(0.5) = 0.7937.
RATIOS = [2.0, 0.72, 0.5, 1.0, 1.0]
LENGTHS = [2, 3]


def run(advantages, mask=(True,) * 5, **algo):
    """(loss, gradient by the log-probs, result); the old policy has log-probs of -1."""
    logprobs = (f64(RATIOS).log() - 1).requires_grad_()
    spread = f64([advantages[0]] * 2 + [advantages[1]] * 3)
    batch = batch_of(f64([-1.0] * 5), spread, torch.tensor(mask), lengths=LENGTHS)
    result = lose(logprobs, batch, **(algo or WIDE))
    return result.loss_sum.item(), torch.autograd.grad(result.loss_sum, logprobs)[0].tolist(), result


def test_every_token_has_the_mean_ratio_of_its_response():
    loss, gradient, result = run([1.0, -1.0], loss="gspo", gspo={"clip_low": 0.3, "clip_high": 0.25})
    second = 0.5 ** (1 / 3)
    assert loss == pytest.approx(-2 * 1.2 + 3 * second, abs=1e-12)
    # d (n s) / d log p_t = s: each of n tokens carries s, and each log-prob moves it by s / n.
    assert gradient == pytest.approx([-1.2, -1.2, second, second, second], abs=1e-12)
    assert values(result.measures)["ratio/sequence_max"] == pytest.approx(1.2)
    assert result.loss_tokens == 5


@pytest.mark.parametrize(
    ("advantages", "loss", "gradient", "high", "low"),
    [
        # 1.2 is inside the band. 0.7937 is below 0.8: clipped where the advantage is negative, else not.
        ([1.0, -1.0], -2 * 1.2 + 3 * 0.8, [-1.2, -1.2, 0, 0, 0], 0, 3 / 5),
        ([1.0, 1.0], -2 * 1.2 - 3 * 0.5 ** (1 / 3), [-1.2, -1.2, *[-(0.5 ** (1 / 3))] * 3], 0, 0),
        ([0.0, 0.0], 0, [0, 0, 0, 0, 0], 0, 0),
    ],
)
def test_whole_responses_are_clipped(advantages, loss, gradient, high, low):
    got, slope, result = run(advantages)
    assert got == pytest.approx(loss, abs=1e-12)
    assert slope == pytest.approx(gradient, abs=1e-12)
    assert (result.measures["clip/high"].value, result.measures["clip/low"].value) == (high, low)


def test_the_defaults_are_those_of_the_paper():
    loss, gradient, result = run([2.0, 1.0], loss="gspo")
    assert loss == pytest.approx(-2 * 2 * 1.0004 - 3 * 0.5 ** (1 / 3))
    assert gradient[:2] == [0, 0]
    assert result.measures["clip/high"].value == 2 / 5


def test_masked_tokens_are_in_no_mean():
    loss, gradient, result = run([1.0, 1.0], mask=(True, False, False, True, True))
    assert loss == pytest.approx(-1.25 - 2)  # 2.0 is clipped to 1.25; 1 and 1 have mean 1
    assert gradient == pytest.approx([0, 0, 0, -1, -1])
    assert result.loss_tokens == 3


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_masked_slots_may_hold_anything(fill):
    logprobs = f64([-1.0, fill, -0.5]).requires_grad_()
    batch = batch_of(f64([-1.1, fill, -0.4]), f64([1.0, fill, 1.0]), torch.tensor([True, False, True]))
    result = lose(logprobs, batch, **WIDE)
    assert result.loss_sum.item() == pytest.approx(-2)
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].tolist() == pytest.approx([-1, 0, -1])


def test_a_ratio_beyond_the_dtype_stays_finite_where_it_is_clipped():
    logprobs = torch.tensor([-0.1, -0.1]).requires_grad_()
    batch = batch_of(torch.tensor([-300.0, -300.0]), torch.ones(2), torch.tensor([True, True]))
    result = lose(logprobs, batch, **WIDE)
    assert result.loss_sum.item() == pytest.approx(-2.5)
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].tolist() == [0, 0]


def test_a_sequence_that_two_ranks_share_has_one_ratio():
    """Each of two context-parallel ranks holds a part of both responses; the sums of both ranks are added."""
    whole = run([1.0, -1.0], loss="gspo", gspo={"clip_low": 0.3, "clip_high": 0.25})
    parts = [([0, 2], [1, 1]), ([1, 3, 4], [1, 2])]
    logprobs = [(f64([RATIOS[slot] for slot in slots]).log() - 1).requires_grad_() for slots, _ in parts]
    objective = Objective(AlgoConfig.model_validate({"loss": "gspo", "gspo": {"clip_low": 0.3, "clip_high": 0.25}}))
    batches = [
        batch_of(
            f64([-1.0] * len(slots)),
            f64([1.0 if slot < 2 else -1.0 for slot in slots]),
            torch.ones(len(slots), dtype=torch.bool),
            lengths=lengths,
        )
        for slots, lengths in parts
    ]
    sums = []
    for batch, part in zip(batches, logprobs, strict=True):
        objective(part, batch, lambda mine: sums.append(mine) or mine)
    total = torch.stack(sums).sum(0)
    results = [objective(part, batch, lambda mine: total) for part, batch in zip(logprobs, batches, strict=True)]
    loss_sum = torch.stack([result.loss_sum for result in results]).sum()
    gradients = torch.autograd.grad(loss_sum, logprobs)
    assert loss_sum.item() == pytest.approx(whole[0])
    for (slots, _), gradient in zip(parts, gradients, strict=True):
        assert gradient.tolist() == pytest.approx([whole[1][slot] for slot in slots])
