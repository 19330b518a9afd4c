from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dapo_megatron.pack import Share, pack
from dapo_megatron.pack.microbatch import build
from dapo_megatron.types import MiniBatch, TrainSample


def sample(seed: int, prompt: int, response: int, trained: float) -> TrainSample:
    generator = torch.Generator().manual_seed(seed)
    length = prompt + response
    mask = (torch.arange(length) >= prompt) & (torch.rand(length, generator=generator) < trained)
    return TrainSample(
        token_ids=torch.randint(150_000, (length,), generator=generator, dtype=torch.int32),
        loss_mask=mask,
        rollout_logprobs=torch.randn(length, generator=generator) * mask,
        advantage=float(torch.randn((), generator=generator, dtype=torch.float64)),
        group=seed // 4,
    )


SAMPLES = st.lists(
    st.builds(
        sample,
        st.integers(0, 99),
        st.integers(1, 9),
        st.sampled_from([0, 0, 1, 5, 23]),
        st.sampled_from([0.0, 0.6, 1.0]),
    ),
    max_size=24,
)
"""Some of one token, some without loss tokens."""


def assert_alike(got: list[MiniBatch], want: list[MiniBatch]) -> None:
    """Bit for bit: types, shapes, values."""
    assert [whole.loss_tokens for whole in got] == [whole.loss_tokens for whole in want]
    for one, other in zip(got, want, strict=True):
        for batch, wanted in zip(one.micro_batches, other.micro_batches, strict=True):
            for field in fields(batch):
                assert bits(getattr(batch, field.name)) == bits(getattr(wanted, field.name)), field.name


def bits(tensor: Tensor | None) -> Any:
    return tensor is not None and (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())


@given(
    SAMPLES,
    st.sampled_from([1, 2, 16]),
    st.sampled_from([(1, 1), (4, 1), (1, 2), (8, 4)]),
    st.integers(1, 3),
    st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_a_share_gives_the_micro_batches_that_its_samples_give(
    samples: list[TrainSample], replicas: int, multiples: tuple[int, int], micro_batch_multiple: int, mini_batch: int
) -> None:
    layout = {"sequence_multiple": multiples[0], "total_multiple": multiples[1]}
    packed = pack(
        samples,
        mini_batch=mini_batch,
        micro_batch_tokens=64,
        replicas=replicas,
        seed=0,
        micro_batch_multiple=micro_batch_multiple,
        **layout,
    )
    assert len(packed.replicas) == replicas
    for replica, bins_of in enumerate(packed.replicas):
        wanted = [
            MiniBatch(tuple(build([samples[index] for index in bin_], **layout) for bin_ in bins), loss_tokens)
            for bins, loss_tokens in zip(bins_of, packed.loss_tokens, strict=True)
        ]
        assert_alike(packed.share(replica).mini_batches(**layout), wanted)


def test_what_travels_is_flat_and_nine_bytes_a_token() -> None:
    first, second, third = (sample(seed, 3, response, 1.0) for seed, response in ((0, 4), (1, 0), (2, 9)))
    share = Share.of([[[second], []], [[third, first]]], [0, 13])
    assert share.lengths.tolist() == [3, 12, 7]
    assert share.sample_counts.tolist() == [1, 0, 2]
    assert share.micro_batch_counts.tolist() == [2, 1]
    assert share.loss_tokens.tolist() == [0, 13]
    assert share.token_ids.tolist() == [
        *second.token_ids.tolist(),
        *third.token_ids.tolist(),
        *first.token_ids.tolist(),
    ]
    columns = share.token_ids, share.loss_mask, share.rollout_logprobs
    assert [column.dtype for column in columns] == [torch.int32, torch.bool, torch.float32]
    assert sum(column.nbytes for column in columns) == 9 * (3 + 12 + 7)


@pytest.mark.parametrize("bins", [[], [[[]]]], ids=["no update", "nothing but padding"])
def test_a_share_without_samples_has_the_types_of_others(bins: list[list[list[TrainSample]]]) -> None:
    empty, full = Share.of(bins, [0] * len(bins)), Share.of([[[sample(0, 2, 3, 1.0)]]], [3])
    assert [tensor.dtype for tensor in empty] == [tensor.dtype for tensor in full]
    assert [whole.micro_batches[0].loss_tokens for whole in empty.mini_batches()] == [0] * len(bins)


def test_micro_batches_do_not_keep_the_share_in_memory() -> None:
    share = Share.of([[[sample(0, 2, 30, 1.0)], [sample(1, 2, 30, 1.0)]]], [60])
    own = {tensor.untyped_storage().data_ptr() for tensor in share}
    for batch in share.mini_batches()[0].micro_batches:
        tensors = [getattr(batch, field.name) for field in fields(batch) if getattr(batch, field.name) is not None]
        assert not own & {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
