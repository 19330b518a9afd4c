from collections import Counter
from dataclasses import fields
from itertools import pairwise
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.errors import DapoError
from dapo_megatron.pack import pack
from dapo_megatron.types import TrainSample

BUDGET = 64


def sample(number, prompt, response, trained=True):
    """Every token, log-prob and advantage tells which sample it is of, every group which four."""
    length = prompt + response
    mask = (torch.arange(length) >= prompt) & trained
    return TrainSample(
        token_ids=1 + 1000 * number + torch.arange(length, dtype=torch.int32),
        loss_mask=mask,
        rollout_logprobs=torch.where(mask, -(number + torch.arange(length) / 1024), 0.0),
        advantage=float(number),
        group=number // 4,
    )


@st.composite
def rollouts(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 28), st.booleans()), min_size=1, max_size=40))
    return [sample(number, *shape) for number, shape in enumerate(shapes)]


LAYOUTS = st.fixed_dictionaries(
    {
        "mini_batch": st.integers(1, 16),
        "replicas": st.integers(1, 4),
        "seed": st.one_of(st.integers(0, 3), st.text(max_size=3)),
        "sequence_multiple": st.sampled_from([1, 2, 4, 8]),
        "total_multiple": st.sampled_from([1, 2]),
        "micro_batch_multiple": st.integers(1, 3),
        "attention_tokens": st.sampled_from([inf, 100.0, 10.0]),
    }
)


def do(samples, **layout):
    """Return the mini-batches of every replica, as its ranks make them."""
    plain: dict[str, Any] = {"mini_batch": 512, "micro_batch_tokens": BUDGET, "replicas": 1, "seed": 0}
    packed = pack(samples, **{**plain, **layout})
    multiples = {name: layout.get(name, 1) for name in ("sequence_multiple", "total_multiple")}
    return [packed.share(replica).mini_batches(**multiples) for replica in range(len(packed.replicas))]


def micro_batches(replicas):
    return [batch for mini_batches in replicas for mini_batch in mini_batches for batch in mini_batch.micro_batches]


def tensors(replicas):
    return [getattr(b, f.name) for b in micro_batches(replicas) for f in fields(b) if getattr(b, f.name) is not None]


@given(rollouts(), LAYOUTS)
@settings(max_examples=50, deadline=None)
def test_every_sample_goes_to_one_place(samples, layout):
    packed = pack(samples, micro_batch_tokens=BUDGET, **layout)
    places = [index for replica in packed.replicas for bins in replica for bin_ in bins for index in bin_]
    assert sorted(places) == list(range(len(samples)))


@given(rollouts(), LAYOUTS)
@settings(max_examples=150, deadline=None)
def test_no_token_is_lost_repeated_or_moved(samples, layout):
    seen = Counter()
    for batch in micro_batches(do(samples, **layout)):
        bounds = batch.cu_seqlens.tolist()
        assert batch.groups_S.shape == (len(bounds) - 1,)
        for (start, end), group in zip(pairwise(bounds), batch.groups_S.tolist(), strict=True):
            number, real = int(batch.tokens_T[start]) // 1000, int((batch.labels_T[start:end] > 0).sum())
            here, rest = slice(start, start + real), slice(start + real, end)
            for padding in (batch.tokens_T, batch.labels_T, batch.loss_mask_T, batch.scored_T, batch.weights_T):
                assert not padding[rest].any()
            assert batch.positions_T[start:end].tolist() == list(range(end - start))
            if real == 0:
                assert (group, len(bounds)) == (-1, 2)
                continue
            original = samples[number]
            seen[number] += 1
            assert group == original.group
            assert torch.equal(batch.tokens_T[here], original.token_ids[:-1])
            assert torch.equal(batch.labels_T[here], original.token_ids[1:])
            assert torch.equal(batch.loss_mask_T[here], original.loss_mask[1:])
            assert torch.equal(batch.scored_T[here], original.loss_mask[1:])
            assert torch.equal(batch.weights_T[here], original.loss_mask[1:].float())
            assert torch.equal(batch.rollout_logprobs_T[here], original.rollout_logprobs[1:])
            assert (batch.advantages_T[here] == original.advantage).all()
    assert seen == Counter(number for number, original in enumerate(samples) if original.length > 1)


@given(rollouts(), LAYOUTS)
@settings(max_examples=150, deadline=None)
def test_budget_multiples_and_equal_counts(samples, layout):
    replicas = do(samples, **layout)
    unit = layout["sequence_multiple"] * layout["total_multiple"]
    for batch in micro_batches(replicas):
        assert 0 < batch.slots <= BUDGET
        assert batch.slots % unit == 0
        assert all(
            (end - start) % layout["sequence_multiple"] == 0 for start, end in pairwise(batch.cu_seqlens.tolist())
        )
        assert batch.cu_seqlens[-1] == batch.slots
        columns = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name.endswith("_T")}
        assert all(x_T is None or x_T.shape == (batch.slots,) for x_T in columns.values())
    assert len(replicas) == layout["replicas"]
    assert {len(mini_batches) for mini_batches in replicas} == {-(-len(samples) // layout["mini_batch"])}
    for same_update in zip(*replicas, strict=True):
        (count,) = {len(mini_batch.micro_batches) for mini_batch in same_update}
        assert count % layout["micro_batch_multiple"] == 0


@given(rollouts(), LAYOUTS)
@settings(max_examples=100, deadline=None)
def test_count_is_that_of_the_whole_mini_batch(samples, layout):
    for same_update in zip(*do(samples, **layout), strict=True):
        batches = [batch for mini_batch in same_update for batch in mini_batch.micro_batches]
        assert {mini_batch.loss_tokens for mini_batch in same_update} == {sum(batch.loss_tokens for batch in batches)}


@given(rollouts(), LAYOUTS)
@settings(max_examples=50, deadline=None)
def test_same_arguments_same_result(samples, layout):
    assert all(map(torch.equal, tensors(do(samples, **layout)), tensors(do(samples, **layout))))


def test_another_seed_another_order():
    samples = [sample(number, 3, 4) for number in range(32)]
    orders = {
        seed: [batch.groups_S.tolist() for batch in micro_batches(do(samples, mini_batch=8, seed=seed))]
        for seed in (1, 2, "1:2", "2:1", "12")
    }
    assert len({str(order) for order in orders.values()}) == len(orders)


@pytest.mark.parametrize(("responses", "sizes"), [(24, [8, 8, 8]), (20, [6, 7, 7]), (17, [5, 6, 6]), (5, [5]), (0, [])])
def test_mini_batches_are_as_equal_as_can_be(responses, sizes):
    (mini_batches,) = do([sample(number, 1, 1) for number in range(responses)], mini_batch=8)
    assert [mini_batch.loss_tokens for mini_batch in mini_batches] == sizes


def test_rank_without_sequences_gets_padding_without_loss():
    first, second = do([sample(0, 3, 4)], replicas=2, sequence_multiple=4, total_multiple=2)
    assert (first[0].micro_batches[0].slots, first[0].loss_tokens) == (8, 4)
    (dummy,) = second[0].micro_batches
    assert (dummy.slots, dummy.loss_tokens, second[0].loss_tokens) == (8, 0, 4)


def test_mini_batch_without_loss_tokens_stays_an_update():
    ((mini_batch,),) = do([sample(0, 3, 4, trained=False)])
    assert (mini_batch.loss_tokens, len(mini_batch.micro_batches)) == (0, 1)


def test_attention_decides_who_gets_what():
    samples = [sample(0, 1, 40), sample(1, 1, 20), sample(2, 1, 20), sample(3, 1, 4)]

    def shares(**layout):
        replicas = do(samples, replicas=2, **layout)
        return [{int(x) for b in micro_batches([replica]) for x in b.advantages_T.unique()} for replica in replicas]

    assert shares() == [{0, 3}, {1, 2}]  # 40 beside 20 + 20, the last to either
    assert shares(attention_tokens=10.0) == [{0}, {1, 2, 3}]  # 200 beside 60 + 60


def test_sample_that_does_not_fit_is_refused_with_the_arithmetic():
    assert do([sample(0, 1, 64)])[0][0].micro_batches[0].slots == 64
    with pytest.raises(DapoError, match=r"66 tokens fills 65 slots.*micro_batch_tokens\(64\)"):
        do([sample(0, 1, 65)])
    with pytest.raises(DapoError, match=r"fills 64 slots.*multiple of 24 = 48"):
        do([sample(0, 1, 60)], sequence_multiple=8, total_multiple=3)
