import math
import random
from math import inf

import pytest
import torch

from dapo_megatron.measures import values
from dapo_megatron.pack import pack, packing
from dapo_megatron.pack.cost import cost
from dapo_megatron.types import TrainSample


def measured(*given, **how):
    return {name.removeprefix("pack/"): value for name, value in values(packing(*given, **how)).items()}


def sample(slots):
    length = slots + 1
    mask = torch.arange(length) >= 1
    return TrainSample(torch.arange(length, dtype=torch.int32), mask, torch.zeros(length), 1.0, group=0)


def do(samples, **layout):
    return pack(samples, **{"mini_batch": 512, "micro_batch_tokens": 64, "replicas": 1, "seed": 0, **layout})


def test_cost_is_twice_the_tokens_where_attention_costs_as_much_as_the_rest():
    assert cost(1000, attention_tokens=1000) == 2000
    assert cost(500, attention_tokens=1000) == 750
    assert cost(500, attention_tokens=inf) == 500


def test_worked_packing():
    samples = [sample(8), sample(6), sample(6)]  # of 8 slots here, 12 there; costs with 16 tokens: 12, and 8.25 twice
    assert measured(do(samples, replicas=2)) == {
        "waste": 0.0,
        "imbalance_tokens": 12 / 10 - 1,
        "imbalance_cost": 12 / 10 - 1,
        "micro_batches": 1.0,
    }
    stats = measured(do(samples, replicas=2, attention_tokens=16.0), attention_tokens=16.0)
    assert stats["imbalance_cost"] == pytest.approx(16.5 / 14.25 - 1)


def test_padding_of_sequences_of_micro_batches_and_of_empty_ones_is_waste():
    samples = [sample(8), sample(6), sample(6)]
    assert measured(do(samples, sequence_multiple=8))["waste"] == pytest.approx(1 - 20 / 24)
    assert measured(do(samples, total_multiple=16))["waste"] == pytest.approx(1 - 20 / 32)
    assert measured(do(samples, sequence_multiple=2, replicas=4))["waste"] == pytest.approx(1 - 20 / 22)


def test_the_worst_update_counts_and_micro_batches_are_averaged():
    samples = [sample(60), sample(60), sample(60), sample(4)]
    stats = measured(do(samples, mini_batch=2, replicas=1))
    assert stats["imbalance_tokens"] == stats["imbalance_cost"] == 0
    assert stats["micro_batches"] == 1.5  # 120 slots in two of 64, 64 in one
    stats = measured(do(samples, mini_batch=2, replicas=2))
    assert (
        stats["imbalance_tokens"] == stats["imbalance_cost"] == pytest.approx(60 / 32 - 1)
    )  # 60 beside 4; the other mini_batch has 60 beside 60
    assert stats["micro_batches"] == 1


def test_nothing_packed():
    stats = measured(do([]))
    assert stats["imbalance_tokens"] == stats["imbalance_cost"] == 0
    assert math.isnan(stats["waste"]) and math.isnan(stats["micro_batches"])


def test_a_full_rollout_is_balanced():
    rng = random.Random(0)
    samples = [sample(rng.randint(5, 420)) for _ in range(1024)]
    layout = {"mini_batch": 256, "micro_batch_tokens": 4096, "replicas": 8, "sequence_multiple": 4}
    stats = measured(do(samples, **layout, attention_tokens=800.0), attention_tokens=800.0)
    assert stats["imbalance_cost"] < 0.01
    assert stats["imbalance_tokens"] < 0.02
    assert stats["waste"] < 0.02
