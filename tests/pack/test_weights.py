import json
from pathlib import Path

import pytest
import torch

from dapo_megatron.pack.weights import token_weights
from dapo_megatron.types import TrainSample

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/algo.json").read_text())["token_mean_scope"]


def sample(loss_tokens, group=0, prompt=3):
    length = prompt + loss_tokens
    return TrainSample(
        token_ids=torch.zeros(length, dtype=torch.int64),
        loss_mask=torch.arange(length) >= prompt,
        rollout_logprobs=torch.zeros(length),
        advantage=0.0,
        group=group,
        policy_version=0,
    )


def scoped_mean(samples, weights, losses):
    """Of losses that are the same for all tokens of a sample."""
    counts = [sample.loss_tokens for sample in samples]
    return sum(w * n * x for w, n, x in zip(weights, counts, losses, strict=True)) / sum(counts)


@pytest.mark.parametrize(
    ("scope", "loss", "token_weight"),
    [
        ("token", "minibatch_global", "weight_of_one_token_global"),
        ("prompt", "per_group_then_mean", "weight_of_one_token_per_group"),
        ("sample", "sample_level", "weight_of_one_token_sample"),
    ],
)
def test_worked_scopes(scope, loss, token_weight):
    samples = [sample(length, group) for length, group in zip(GOLDEN["lengths"], (0, 0, 1, 1), strict=True)]
    weights = token_weights(samples, scope)
    assert scoped_mean(samples, weights, [-a for a in GOLDEN["A"]]) == pytest.approx(GOLDEN[loss], abs=1e-9)
    tokens = sum(GOLDEN["lengths"])
    assert [weight / tokens for weight in weights] == pytest.approx(GOLDEN[token_weight], abs=1e-12)


@pytest.mark.parametrize("scope", ["token", "prompt", "sample"])
def test_weights_sum_to_the_number_of_tokens_and_prompts_do_not_count(scope):
    samples = [sample(5, 0, prompt=50), sample(1, 0), sample(7, 1), sample(0, 1), sample(0, 2)]
    weights = token_weights(samples, scope)
    assert sum(w * s.loss_tokens for w, s in zip(weights, samples, strict=True)) == pytest.approx(13)


def test_responses_without_loss_tokens_do_not_count():
    assert token_weights([sample(2), sample(0), sample(4)], "sample") == [1.5, 0.0, 0.75]
    assert token_weights([sample(2, 0), sample(0, 1), sample(4, 2)], "prompt") == [1.5, 0.0, 0.75]
    assert token_weights([sample(0), sample(0)], "sample") == [0.0, 0.0]
