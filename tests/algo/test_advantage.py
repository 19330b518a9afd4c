import json
from pathlib import Path

import pytest
import torch

from dapo_megatron.algo.advantage import group_advantages

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/algo.json").read_text())


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GOLDEN["advantages"])
def test_worked_groups(name):
    case = GOLDEN["advantages"][name]
    close(group_advantages(case["rewards"]), case["adv_unbiased_eps1e-6"])
    close(group_advantages(case["rewards"], ddof=0), case["adv_population_eps1e-6"])
    if case["adv_unbiased_eps0"]:
        close(group_advantages(case["rewards"], eps=0.0), case["adv_unbiased_eps0"])


@pytest.mark.parametrize("case", GOLDEN["advantages_G16"], ids=lambda case: f"{case['correct']} of 16")
def test_groups_of_sixteen(case):
    right = case["correct"]
    rewards = [1.0] * right + [-1.0] * (16 - right)
    for ddof, kind in ((1, "unbiased"), (0, "population")):
        expected = [case[f"adv_right_{kind}"]] * right + [case[f"adv_wrong_{kind}"]] * (16 - right)
        close(group_advantages(rewards, ddof=ddof), expected)


def test_without_std_rewards_are_only_centred():
    close(group_advantages([1.0, 0.5, -1.0, -2.0], ddof=None), [1.375, 0.875, -0.625, -1.625])


@pytest.mark.parametrize("ddof", [None, 0, 1])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.7] * 16, [-1.0], []])
def test_nothing_to_compare_gives_exactly_zero(rewards, ddof):
    assert group_advantages(rewards, ddof=ddof, eps=0.0).tolist() == [0.0] * len(rewards)


def test_dtype_of_tensors_is_kept():
    assert group_advantages([1, -1]).dtype == torch.float64
    assert group_advantages(torch.tensor([1.0, -1.0])).dtype == torch.float32
    with pytest.raises(AssertionError, match="floating"):
        group_advantages(torch.tensor([1, -1]))
    with pytest.raises(AssertionError, match=r"must be \[G\]"):
        group_advantages(torch.ones(2, 2))
