import random
from collections import Counter
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.errors import DapoError
from dapo_megatron.pack import PackStats, pack
from dapo_megatron.pack.weights import token_weights
from dapo_megatron.types import TrainSample

BUDGET = 64


def sample(number, prompt, response, trained=True):
    """Every token, log-prob and advantage tells which sample it is of."""
    length = prompt + response
    mask = (torch.arange(length) >= prompt) & trained
    return TrainSample(
        token_ids=1 + 1000 * number + torch.arange(length),
        loss_mask=mask,
        rollout_logprobs=torch.where(mask, -(number + torch.arange(length) / 1024), 0.0),
        advantage=float(number),
        group=number // 4,
        policy_version=0,
    )


@st.composite
def rollouts(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 28), st.booleans()), min_size=1, max_size=40))
    return [sample(number, *shape) for number, shape in enumerate(shapes)]


LAYOUTS = st.fixed_dictionaries(
    {
        "mini_batch": st.integers(1, 16),
        "data_parallel": st.integers(1, 4),
        "scope": st.sampled_from(["token", "prompt", "sample"]),
        "seed": st.integers(0, 3),
        "sequence_multiple": st.sampled_from([1, 2, 4, 8]),
        "total_multiple": st.sampled_from([1, 2]),
    }
)


def do(samples, **layout):
    plain: dict[str, Any] = {
        "mini_batch": 512,
        "micro_batch_tokens": BUDGET,
        "data_parallel": 1,
        "scope": "token",
        "seed": 0,
    }
    return pack(samples, **{**plain, **layout})


def micro_batches(ranks):
    return [batch for updates in ranks for update in updates for batch in update.micro_batches]


@given(rollouts(), LAYOUTS)
@settings(max_examples=150, deadline=None)
def test_no_token_is_lost_repeated_or_moved(samples, layout):
    seen = Counter()
    for batch in micro_batches(do(samples, **layout)):
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            number, real = int(batch.tokens_T[start]) // 1000, int((batch.labels_T[start:end] > 0).sum())
            if real == 0:
                assert not batch.loss_mask_T[start:end].any()
                continue
            here, original = slice(start, start + real), samples[number]
            seen[number] += 1
            assert torch.equal(batch.tokens_T[here], original.token_ids[:-1])
            assert torch.equal(batch.labels_T[here], original.token_ids[1:])
            assert torch.equal(batch.loss_mask_T[here], original.loss_mask[1:])
            assert torch.equal(batch.rollout_logprobs_T[here], original.rollout_logprobs[1:])
            assert (batch.advantages_T[here] == original.advantage).all()
            assert not batch.loss_mask_T[start + real : end].any()
            assert batch.positions_T[start:end].tolist() == list(range(end - start))
    assert seen == Counter(number for number, original in enumerate(samples) if original.length > 1)


@given(rollouts(), LAYOUTS)
@settings(max_examples=150, deadline=None)
def test_budget_multiples_and_equal_counts(samples, layout):
    ranks = do(samples, **layout)
    unit = layout["sequence_multiple"] * layout["total_multiple"]
    for batch in micro_batches(ranks):
        assert 0 < batch.tokens <= BUDGET
        assert batch.tokens % unit == 0
        assert all(
            (end - start) % layout["sequence_multiple"] == 0 for start, end in pairwise(batch.cu_seqlens.tolist())
        )
        assert batch.cu_seqlens[-1] == batch.tokens
    assert len(ranks) == layout["data_parallel"]
    assert {len(updates) for updates in ranks} == {-(-len(samples) // layout["mini_batch"])}
    for same_update in zip(*ranks, strict=True):
        assert len({len(update.micro_batches) for update in same_update}) == 1


@given(rollouts(), LAYOUTS)
@settings(max_examples=100, deadline=None)
def test_count_and_weights_are_those_of_the_whole_mini_batch(samples, layout):
    for same_update in zip(*do(samples, **layout), strict=True):
        batches = [batch for update in same_update for batch in update.micro_batches]
        tokens = sum(batch.loss_tokens for batch in batches)
        assert {update.loss_tokens for update in same_update} == {tokens}
        weights = torch.cat([batch.weights_T[batch.loss_mask_T] for batch in batches]).double()
        advantages = torch.cat([batch.advantages_T[batch.loss_mask_T] for batch in batches])
        assert weights.sum().item() == pytest.approx(tokens, rel=1e-5)
        inside = [samples[int(number)] for number in advantages.unique()]
        expected = dict(zip((s.advantage for s in inside), token_weights(inside, layout["scope"]), strict=True))
        assert weights.tolist() == pytest.approx([expected[float(number)] for number in advantages], rel=1e-5)


def test_same_seed_same_result_other_seed_other_order():
    samples = [sample(number, 3, 4) for number in range(32)]

    def tensors(seed):
        ranks = do(samples, mini_batch=8, data_parallel=2, seed=seed)
        return [getattr(b, f.name) for b in micro_batches(ranks) for f in fields(b) if getattr(b, f.name) is not None]

    assert all(map(torch.equal, tensors(1), tensors(1)))
    assert not all(map(torch.equal, tensors(1), tensors(2)))


@pytest.mark.parametrize(("responses", "sizes"), [(24, [8, 8, 8]), (20, [6, 7, 7]), (17, [5, 6, 6]), (5, [5]), (0, [])])
def test_mini_batches_are_as_equal_as_can_be(responses, sizes):
    (updates,) = do([sample(number, 1, 1) for number in range(responses)], mini_batch=8)
    assert [update.loss_tokens for update in updates] == sizes


def test_rank_without_sequences_gets_padding_without_loss():
    first, second = do([sample(0, 3, 4)], data_parallel=2, sequence_multiple=4, total_multiple=2)
    assert (first[0].micro_batches[0].tokens, first[0].loss_tokens) == (8, 4)
    (dummy,) = second[0].micro_batches
    assert (dummy.tokens, dummy.loss_tokens, second[0].loss_tokens) == (8, 0, 4)


def test_mini_batch_without_loss_tokens_stays_an_update():
    ((update,),) = do([sample(0, 3, 4, trained=False)])
    assert (update.loss_tokens, len(update.micro_batches)) == (0, 1)


def test_sample_that_does_not_fit_is_refused_with_the_arithmetic():
    assert do([sample(0, 1, 64)])[0][0].micro_batches[0].tokens == 64
    with pytest.raises(DapoError, match=r"66 tokens fills 65 slots.*micro_batch_tokens\(64\)"):
        do([sample(0, 1, 65)])
    with pytest.raises(DapoError, match=r"fills 64 slots.*multiple of 24 = 48"):
        do([sample(0, 1, 60)], sequence_multiple=8, total_multiple=3)


def test_stats():
    samples = [sample(0, 3, 6), sample(1, 3, 4), sample(2, 3, 4)]
    exact = PackStats.of(samples, do(samples, data_parallel=2))
    assert exact == PackStats(waste=0.0, imbalance=12 / 10 - 1)
    assert PackStats.of(samples, do(samples, sequence_multiple=8)).waste == pytest.approx(1 - 20 / 24)
    assert PackStats.of([], do([])) == PackStats(waste=0.0, imbalance=0.0)


def test_a_full_rollout_is_balanced():
    rng = random.Random(0)
    samples = [sample(number, rng.randint(5, 20), rng.randint(1, 400)) for number in range(1024)]
    stats = PackStats.of(
        samples, do(samples, mini_batch=256, micro_batch_tokens=4096, data_parallel=8, sequence_multiple=4)
    )
    assert stats.imbalance < 0.01
    assert stats.waste < 0.02
