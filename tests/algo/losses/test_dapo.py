import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.measures import Max, values
from tests.helpers.losses import batch_of, f64, lose

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/algo.json").read_text())
DAPO: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": DAPO,
    "symmetric_0.2": {"clip_low": 0.2, "clip_high": 0.2},
    "dapo_dual_clip_c10": {**DAPO, "dual_clip": 10.0},
}
BATCHES = [name for name in GOLDEN if name.startswith("loss_")]


def dapo_loss(logprobs, old, advantages, mask, *, weights=None, ref=None, kl=None, **settings):
    batch = batch_of(old, advantages, mask, weights_T=weights, ref_T=ref)
    return lose(logprobs, batch, dapo=settings, kl=kl or {})


def close(actual, expected):
    torch.testing.assert_close(actual, f64(expected), rtol=0, atol=1e-9)


def one_token(ratio, advantage, **how):
    """(objective, its gradient by the log-prob, result) of one token."""
    logprobs = (f64([ratio]).log() - 1.0).requires_grad_()
    result = dapo_loss(logprobs, f64([-1.0]), f64([advantage]), torch.tensor([True]), **how)
    result.loss_sum.backward()
    assert logprobs.grad is not None
    return -result.loss_sum.item(), -logprobs.grad.item(), result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("row", GOLDEN["clip"], ids=lambda row: f"r={row['ratio']} A={row['A']}")
def test_clip_table(row, variant):
    value, gradient, clipped = row[variant]
    actual_value, actual_gradient, result = one_token(row["ratio"], row["A"], **VARIANTS[variant])
    assert actual_value == pytest.approx(value, abs=1e-9)
    if row["ratio"] not in (0.8, 1.2, 1.28):  # on a kink, exp(log(r)) decides the side
        assert actual_gradient == pytest.approx(gradient, abs=1e-9)
        assert sum(result.measures[name].value for name in ("clip/high", "clip/low", "clip/dual")) == clipped
    assert result.loss_sum.dtype == torch.float64


@pytest.mark.parametrize(("advantage", "edge"), [(1.0, math.log1p(0.28)), (-1.0, math.log1p(-0.2))])
def test_on_a_kink_a_token_is_not_clipped(advantage, edge):
    logprobs = f64([edge]).requires_grad_()
    result = dapo_loss(logprobs, f64([0.0]), f64([advantage]), torch.tensor([True]), **DAPO)
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].item() == pytest.approx(-advantage * math.exp(edge))
    assert result.measures["clip/high"].value == result.measures["clip/low"].value == 0


def flat(sequences):
    return f64([value for sequence in sequences for value in sequence])


def spread(values, sequences):
    return f64([value for value, sequence in zip(values, sequences, strict=True) for _ in sequence])


@pytest.mark.parametrize("mode", ["token", "sample", "seq_sum", "token_dual_clip_c10"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name, mode):
    case = GOLDEN[name]
    old, responses = case["old_logp"], len(case["A"])
    tokens = sum(map(len, old))
    weights = {
        "sample": [tokens / (responses * len(sequence)) for sequence in old],
        "seq_sum": [tokens / responses] * responses,
    }.get(mode)
    logprobs = flat(case["new_logp"]).requires_grad_()
    result = dapo_loss(
        logprobs,
        flat(old),
        spread(case["A"], old),
        torch.ones(tokens, dtype=torch.bool),
        **(VARIANTS["dapo_dual_clip_c10"] if "dual" in mode else DAPO),
        weights=None if weights is None else spread(weights, old),
    )
    assert result.loss_tokens == tokens
    close((result.loss_sum / tokens).detach(), case[mode]["loss"])
    close(torch.autograd.grad(result.loss_sum / tokens, logprobs)[0], flat(case[mode]["dloss_dlogp"]).tolist())


@pytest.mark.parametrize("mode", ["token", "sample"])
def test_gradient_by_logits(mode):
    case = GOLDEN["logits"]
    lengths = [len(tokens) for tokens in case["tokens"]]
    total = sum(lengths)
    labels = torch.tensor([token for tokens in case["tokens"] for token in tokens])[:, None]
    new, old = (f64([row for sequence in case[key] for row in sequence]) for key in ("new_logits", "old_logits"))
    new.requires_grad_()
    result = dapo_loss(
        new.log_softmax(-1).gather(1, labels)[:, 0],
        old.log_softmax(-1).gather(1, labels)[:, 0],
        spread(case["A"], case["tokens"]),
        torch.ones(total, dtype=torch.bool),
        **DAPO,
        weights=spread([total / (2 * length) for length in lengths], case["tokens"]) if mode == "sample" else None,
    )
    close((result.loss_sum / total).detach(), case[mode]["loss"])
    expected = [row for sequence in case[mode]["dloss_dlogits"] for row in sequence]
    close(torch.autograd.grad(result.loss_sum / total, new)[0], expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -500.0])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_masked_slots_contribute_nothing(garbage, estimator):
    mask = torch.tensor([True, False, True])
    how: dict[str, Any] = {**DAPO, "dual_clip": 10.0, "kl": {"coef": 0.1, "estimator": estimator}}

    def run(fill):
        logprobs = f64([-1.0, fill, -0.5]).requires_grad_()
        old, advantages = f64([-1.1, fill, -0.4]), f64([1.0, fill, -1.0])
        extra: dict[str, Any] = {"weights": f64([2.0, fill, 0.5]), "ref": f64([-0.9, fill, -0.7])}
        result = dapo_loss(logprobs, old, advantages, mask, **how, **extra)
        return result, torch.autograd.grad(result.loss_sum, logprobs)[0]

    clean, clean_gradient = run(0.0)
    result, gradient = run(garbage)
    assert result.loss_tokens == 2
    assert result.loss_sum == clean.loss_sum
    assert torch.equal(gradient, clean_gradient)
    assert gradient[1] == 0
    assert values(result.measures) == values(clean.measures)


def test_all_masked_gives_zero_sums_and_gradient():
    logprobs = f64([-1.0, math.nan]).requires_grad_()
    result = dapo_loss(logprobs, f64([0.0, 0.0]), f64([1.0, 1.0]), torch.tensor([False, False]), **DAPO)
    assert result.loss_sum == 0
    assert result.loss_tokens == 0
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].tolist() == [0.0, 0.0]
    shown = values(result.measures)
    assert shown.pop("ratio/max") == 0
    assert all(math.isnan(value) for value in shown.values())


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_ratio_beyond_the_dtype_stays_finite_where_it_is_clipped(advantage):
    logprobs = torch.tensor([-0.1]).requires_grad_()
    args = (torch.tensor([-200.0]), torch.tensor([advantage]), torch.tensor([True]))
    result = dapo_loss(logprobs, *args, **DAPO, dual_clip=10.0)
    assert result.loss_sum.item() == pytest.approx(10.0 if advantage < 0 else -1.28 * advantage)
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].item() == 0
    assert result.loss_sum.dtype == torch.float32


def test_measures_are_means_over_loss_tokens():
    ratios = [1.1, 1.5, 0.7, 12.0, 3.0]
    result = dapo_loss(
        f64(ratios).log().requires_grad_(),
        f64([0.0] * 5),
        f64([1.0, 1.0, -1.0, -1.0, -1.0]),
        torch.tensor([True, True, True, True, False]),
        **DAPO,
        dual_clip=10.0,
        ref=f64(ratios).log() + 1.0,
    )
    assert values(result.measures) == pytest.approx(
        {
            "clip/high": 1 / 4,
            "clip/low": 1 / 4,
            "clip/dual": 1 / 4,
            "ratio/mean": (1.1 + 1.5 + 0.7 + 12.0) / 4,
            "ratio/max": 12.0,
            "kl/old": sum(ratio - 1 - math.log(ratio) for ratio in ratios[:4]) / 4,
            "kl/ref": math.e - 2,
        }
    )
    assert not any(torch.as_tensor(total).requires_grad for total in map(_total, result.measures.values()))


def _total(measure):
    return measure.largest if isinstance(measure, Max) else measure.total


@pytest.mark.parametrize(("estimator", "value", "slope"), [("k2", 0.125, 0.5), ("k3", 0.10653066, 0.39346934)])
def test_kl_term_is_weighted_and_added(estimator, value, slope):
    logprobs = f64([-1.0]).requires_grad_()
    result = dapo_loss(
        logprobs,
        f64([-1.0]),
        f64([0.0]),
        torch.tensor([True]),
        **DAPO,
        weights=f64([3.0]),
        ref=f64([-1.5]),
        kl={"coef": 0.1, "estimator": estimator},
    )
    assert result.loss_sum.item() == pytest.approx(0.3 * value)
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].item() == pytest.approx(0.3 * slope)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logprobs", "old", "advantages", "weights", "ref"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("dual_clip", [None, 10.0])
def test_what_is_not_finite_shows(value, where, advantage, dual_clip):
    """Also where clipping or an advantage of 0 leaves the loss of the token finite."""
    inputs = {
        "logprobs": f64([-1.0, -0.5]),
        "old": f64([-1.1, -0.4]),
        "advantages": f64([1.0, advantage]),
        "weights": f64([1.0, 1.0]),
        "ref": f64([-1.0, -0.6]),
    }
    inputs[where][1] = value
    result = dapo_loss(
        inputs["logprobs"].requires_grad_(),
        inputs["old"],
        inputs["advantages"],
        torch.tensor([True, True]),
        **DAPO,
        dual_clip=dual_clip,
        weights=inputs["weights"],
        ref=inputs["ref"],
    )
    means = {name: value for name, value in values(result.measures).items() if not name.endswith("max")}
    assert not all(map(math.isfinite, [result.loss_sum, *means.values()]))
    if where in ("logprobs", "old") and not (ratio := (inputs["logprobs"] - inputs["old"]).exp()[1]).isfinite():
        assert not math.isfinite(result.measures["ratio/mean"].value), ratio


def test_a_ratio_beyond_the_dtype_shows_where_it_is_clipped():
    args = (torch.tensor([-200.0]), torch.tensor([1.0]), torch.tensor([True]))
    result = dapo_loss(torch.tensor([-0.1]).requires_grad_(), *args, **DAPO)
    assert result.loss_sum.isfinite()
    assert result.measures["ratio/mean"].value == result.measures["ratio/max"].value == math.inf


def test_one_slot_outside_the_loss():
    """What a micro-batch without sequences comes to."""
    logprobs = torch.tensor([-1.0]).requires_grad_()
    zero = torch.zeros(1)
    result = dapo_loss(logprobs, zero, zero, torch.tensor([False]), **DAPO, weights=zero)
    assert (result.loss_sum.item(), result.loss_tokens.item()) == (0.0, 0)
    assert torch.autograd.grad(result.loss_sum, logprobs)[0].tolist() == [0.0]


def test_shapes_are_checked_first():
    three, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(AssertionError, match="alike"):
        dapo_loss(torch.zeros(2), three, three, mask)
    with pytest.raises(AssertionError, match="alike"):
        dapo_loss(three, three, torch.zeros(1), mask)
    with pytest.raises(AssertionError, match="bool"):
        dapo_loss(three, three, three, torch.ones(3))
    with pytest.raises(AssertionError, match="reference"):
        dapo_loss(three, three, three, mask, kl={"coef": 0.1})
