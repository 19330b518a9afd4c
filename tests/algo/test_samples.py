import pytest
import torch

from dapo_megatron.algo.advantage import group_advantages
from dapo_megatron.algo.samples import to_samples
from dapo_megatron.config import AlgoConfig
from dapo_megatron.types import FinishReason, Group, Prompt
from tests.helpers.completions import completion as made


def completion(tokens, finish=FinishReason.STOP):
    return made(tokens, [-0.5 - index for index in range(len(tokens))], finish)


def group(*completions, rewards, prompt=(7, 8)):
    correct = tuple(reward > 0 for reward in rewards)
    return Group(Prompt("a:1", prompt, "", "1"), completions, (None,) * len(rewards), correct, tuple(rewards))


GROUPS = [
    group(completion([1, 2]), completion([3], FinishReason.LENGTH), rewards=(1.0, -1.0)),
    group(completion([4, 5, 6]), completion([9]), rewards=(-0.5, 1.0), prompt=(1,)),
]


def test_tokens_mask_and_logprobs():
    first, second, third, fourth = to_samples(GROUPS, AlgoConfig(), filter_truncated=False)
    assert first.token_ids.tolist() == [7, 8, 1, 2]
    assert first.loss_mask.tolist() == [False, False, True, True]
    assert first.rollout_logprobs.tolist() == [0.0, 0.0, -0.5, -1.5]
    assert (first.token_ids.dtype, first.rollout_logprobs.dtype) == (torch.int32, torch.float32)
    assert second.loss_tokens == 1
    assert third.token_ids.tolist() == [1, 4, 5, 6]
    assert [sample.group for sample in (first, second, third, fourth)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("std", "ddof"), [("unbiased", 1), ("population", 0), ("none", None)])
def test_advantages_compare_the_responses_of_a_group(std, ddof):
    algo = AlgoConfig(advantage_std=std, advantage_eps=0.25)
    samples = to_samples(GROUPS, algo, filter_truncated=False)
    expected = [group_advantages(group.rewards, ddof=ddof, eps=0.25).tolist() for group in GROUPS]
    assert [sample.advantage for sample in samples] == expected[0] + expected[1]


def test_filtered_responses_lose_their_tokens_but_stay_in_the_statistics():
    kept = to_samples(GROUPS, AlgoConfig(), filter_truncated=False)
    filtered = to_samples(GROUPS, AlgoConfig(), filter_truncated=True)
    assert [sample.loss_tokens for sample in kept] == [2, 1, 3, 1]
    assert [sample.loss_tokens for sample in filtered] == [2, 0, 3, 1]
    assert filtered[1].rollout_logprobs.tolist() == [0.0, 0.0, 0.0]
    assert [sample.advantage for sample in filtered] == [sample.advantage for sample in kept]


def test_response_without_tokens():
    sample, _ = to_samples(
        [group(completion([]), completion([3]), rewards=(1.0, -1.0))], AlgoConfig(), filter_truncated=False
    )
    assert sample.token_ids.tolist() == [7, 8]
    assert sample.loss_tokens == 0
