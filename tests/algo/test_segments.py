import torch

from dapo_megatron.algo.segments import segment_sums, segments

CU_SEQLENS = torch.tensor([0, 2, 5, 5, 6], dtype=torch.int32)


def test_segments_of_slots():
    assert segments(CU_SEQLENS).tolist() == [0, 0, 1, 1, 1, 3]
    assert segments(CU_SEQLENS).dtype == torch.int64


def test_sums_of_segments():
    values = torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64)
    assert segment_sums(values, CU_SEQLENS).tolist() == [3, 28, 0, 32]
    assert segment_sums(values.double(), CU_SEQLENS).dtype == torch.float64


def test_a_sum_does_not_depend_on_where_its_segment_lies():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    alone = segment_sums(values, torch.tensor([0, 1000], dtype=torch.int32))
    after = segment_sums(torch.cat([torch.full((7,), 0.1), values]), torch.tensor([0, 7, 1007], dtype=torch.int32))
    assert after[1] == alone[0]
