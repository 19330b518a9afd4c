import json
import math
from pathlib import Path

import pytest
import torch

from dapo_megatron.algo.correction import correct, importance
from dapo_megatron.config import CorrectionConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/algo.json").read_text())["correction"]
LENGTHS = [len(tokens) for tokens in GOLDEN["engine"]]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def logs(sequences):
    return f64([value for sequence in sequences for value in sequence]).log()


OLD, ROLLOUT = logs(GOLDEN["trainer"]), logs(GOLDEN["engine"])
CU_SEQLENS = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
ALL = torch.ones(6, dtype=torch.bool)


def flat(values):
    """Per token; values of whole responses are repeated."""
    lists = [value if isinstance(value, list) else [value] * n for value, n in zip(values, LENGTHS, strict=True)]
    return [value for sequence in lists for value in sequence]


def test_importance_of_tokens_and_of_sequences():
    tokens = importance(OLD, ROLLOUT, ALL)
    sequences = importance(OLD, ROLLOUT, ALL, CU_SEQLENS)
    assert tokens.dtype == sequences.dtype == torch.float64
    assert tokens.tolist() == pytest.approx(flat(GOLDEN["importance_token"]), rel=1e-14)
    assert sequences.tolist() == pytest.approx(flat(GOLDEN["importance_sequence"]), rel=1e-14)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated(level):
    config = CorrectionConfig(kind="truncated", level=level, cap=2.0)
    weights, mask, changed = correct(OLD, ROLLOUT, ALL, CU_SEQLENS, config)
    assert weights.tolist() == pytest.approx(flat(GOLDEN[f"truncated_{level}_cap_2"]), rel=1e-14)
    assert mask.all()
    assert changed.tolist() == [value > 2 for value in flat(GOLDEN[f"importance_{level}"])]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked(level):
    config = CorrectionConfig(kind="masked", level=level, band=(0.4, 5.0))
    weights, mask, changed = correct(OLD, ROLLOUT, ALL, CU_SEQLENS, config)
    expected = flat(GOLDEN[f"masked_{level}_band_0.4_to_5"])
    assert mask.tolist() == [value is not None for value in expected]
    assert changed.tolist() == [value is None for value in expected]
    assert weights.tolist() == pytest.approx([value or 0.0 for value in expected], rel=1e-14)


def test_measuring_only_changes_nothing():
    weights, mask, changed = correct(OLD, ROLLOUT, ALL, CU_SEQLENS, CorrectionConfig())
    assert (weights.tolist(), mask.tolist(), changed.any()) == ([1.0] * 6, [True] * 6, False)


def test_ends_of_band_and_cap():
    old = f64([0.4999, 0.5, 1.0, 5.0, 5.0001, 1.0]).log()
    _, low, _, high, above, _ = values = old.exp().tolist()

    def corrected(**config):
        return [x.tolist() for x in correct(old, torch.zeros(6), ALL, CU_SEQLENS, CorrectionConfig(**config))]

    stays = [False, True, True, True, False, True]
    assert corrected(kind="masked", band=(low, high)) == [[0, low, 1, high, 0, 1], stays, [not x for x in stays]]
    assert corrected(kind="truncated", cap=high) == [[*values[:4], high, 1], [True] * 6, [x == above for x in values]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_slots_outside_the_loss_do_not_matter(kind, level, garbage):
    loss_mask = torch.tensor([True, True, False, True, False, True])
    config = CorrectionConfig(kind=kind, level=level, band=(0.4, 5.0))

    def run(fill):
        old, rollout = (torch.where(loss_mask, logprobs, fill) for logprobs in (OLD, ROLLOUT))
        return correct(old, rollout, loss_mask, CU_SEQLENS, config)

    clean, result = run(0.0), run(garbage)
    assert all(torch.equal(left[loss_mask], right[loss_mask]) for left, right in zip(clean, result, strict=True))
    assert result[0].isfinite().all()
    assert not (result[1] & ~loss_mask).any()
    assert not (result[2] & ~loss_mask).any()
    if level == "sequence":  # 0.5 x 4, the token left out is not in the product
        assert run(garbage)[0][0] == pytest.approx(2.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_beyond_the_dtype(level):
    """20,000 tokens that differ by 0.1 nat make a ratio of e^2000."""
    cu_seqlens = torch.tensor([0, 20_000, 40_000], dtype=torch.int32)
    old, rollout = torch.zeros(40_000), torch.cat([torch.full((20_000,), -0.1), torch.full((20_000,), 0.1)])
    loss_mask = torch.ones(40_000, dtype=torch.bool)
    config = CorrectionConfig(kind="truncated", level=level, cap=2.0)
    weights, _, changed = correct(old, rollout, loss_mask, cu_seqlens, config)
    expected = [2.0, 0.0] if level == "sequence" else [math.exp(0.1), math.exp(-0.1)]
    assert weights[[0, -1]].tolist() == pytest.approx(expected, rel=1e-6)
    assert changed.sum() == (20_000 if level == "sequence" else 0)
    weights, mask, _ = correct(old, rollout, loss_mask, cu_seqlens, CorrectionConfig(kind="masked", level=level))
    assert weights.isfinite().all()
    assert mask.sum() == (0 if level == "sequence" else 40_000)


def test_zero_probabilities():
    """The trainer gives 0 to the first token, the engine to the second."""
    old, rollout = f64([-math.inf, -1.0, -1.0]), f64([-1.0, -math.inf, -1.0])
    mask, cu_seqlens = torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    for level in ("token", "sequence"):
        config = CorrectionConfig(kind="truncated", level=level)
        assert correct(old, rollout, mask, cu_seqlens, config)[0].tolist() == [0.0, 2.0, 1.0]
        config = CorrectionConfig(kind="masked", level=level)
        assert correct(old, rollout, mask, cu_seqlens, config)[1].tolist() == [False, False, True]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_nan_stays_in_the_loss(kind, level):
    old = torch.where(torch.arange(6) == 4, math.nan, ROLLOUT)
    config = CorrectionConfig(kind=kind, level=level)
    weights, mask, changed = correct(old, ROLLOUT, ALL, CU_SEQLENS, config)
    assert weights.isnan().tolist() == [False] * 4 + ([True, False] if level == "token" else [True, True])
    assert mask.all()
    assert not changed.any()


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match="alike"):
        importance(OLD, ROLLOUT[:2], ALL)
    with pytest.raises(AssertionError, match="bool"):
        importance(OLD, ROLLOUT, ALL.double())
