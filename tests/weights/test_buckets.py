from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dapo_megatron.weights.buckets import Named, allocate, buckets, describe, flatten, offsets, pieces, unflatten


def test_what_goes_in_comes_out_again() -> None:
    torch.manual_seed(0)
    weights = [
        ("odd", torch.randn(3, 1).to(torch.bfloat16)),
        ("single", torch.randn(5, 7)),
        ("transposed", torch.randn(4, 6).T),
        ("number", torch.tensor(2.5)),
        ("every_other", torch.arange(20, dtype=torch.int64)[::2]),
    ]
    (bucket,) = buckets(weights, 10_000)
    assert sorted(name for name, _ in bucket) == sorted(name for name, _ in weights)
    told = describe(bucket)
    flat = flatten(bucket)
    assert allocate(told["dtypes"], told["shapes"]).shape == flat.shape
    received = unflatten(flat, **told)
    assert [name for name, _ in received] == [name for name, _ in bucket]
    for (_, sent), (_, got) in zip(bucket, received, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert torch.equal(got, sent)


@pytest.mark.parametrize(
    ("limit_bytes", "sizes"),
    [
        (1, [[16], [16], [100], [16], [16]]),
        (128, [[16, 16], [100], [16, 16]]),
        (127, [[16], [16], [100], [16], [16]]),
        (464, [[16, 16], [100, 16], [16]]),
        (10_000, [[16, 16, 100, 16, 16]]),
    ],
)
def test_buckets_keep_the_order_and_the_limit(limit_bytes: int, sizes: list[list[int]]) -> None:
    tensors = [(str(index), torch.zeros(size)) for index, size in enumerate([16, 16, 100, 16, 16])]
    got = [[tensor.numel() for _, tensor in bucket] for bucket in buckets(tensors, limit_bytes)]
    assert got == sizes


def test_tensors_are_taken_only_when_their_bucket_is_due() -> None:
    taken: list[int] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(10):
            taken.append(index)
            yield str(index), torch.zeros(100)

    next(buckets(weights(), bucket_bytes=1000))
    assert len(taken) == 3


def test_ranks_wait_until_the_bucket_before_has_been_used() -> None:
    """All but the tensor that shows that it is whole is gathered after that."""
    events: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(5):
            events.append(f"take {index}")
            yield str(index), torch.zeros(100)

    def use(bucket: Named) -> None:
        events.append("used " + " ".join(name for name, _ in bucket))

    for bucket in buckets(weights(), 1000, lambda: events.append("ready")):
        use(bucket)
    assert events == [
        *("ready", "take 0", "take 1", "take 2", "used 0 1"),
        *("ready", "take 3", "take 4", "used 2 3", "ready", "used 4"),
    ]


def test_each_large_tensor_is_a_piece_and_so_is_what_lies_between() -> None:
    large = 1 << 20
    sizes = [10, 20, large, 5, large + 1, large, 7, 3]
    starts, end = offsets(sizes)
    assert list(pieces(sizes)) == [
        (0, 0, 36),
        (2, starts[2], starts[2] + large),
        (3, starts[3], starts[3] + 5),
        (4, starts[4], starts[4] + large + 1),
        (5, starts[5], starts[5] + large),
        (6, starts[6], end),
    ]
    assert list(pieces([])) == []
