from __future__ import annotations

import pytest
import torch

from dapo_megatron.actor.shard import LayoutError, make_shard, slots_of
from tests.helpers.batches import make_micro_batch

CPU = torch.device("cpu")


def test_ranks_hold_mirrored_chunks() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert slots_of(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert slots_of(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


def test_shards_cover_every_slot_once_and_score_their_own() -> None:
    batch = make_micro_batch([8, 24, 16], seed=1, multiple=8)
    shards = [make_shard(batch, cp=4, cp_rank=rank, sequence_parallel_ranks=1, device=CPU) for rank in range(4)]
    assert sum(shard.batch.loss_tokens for shard in shards) == batch.loss_tokens
    tokens, scored = torch.empty_like(batch.tokens_T), torch.empty_like(batch.labels_T)
    for rank, shard in enumerate(shards):
        mine = slots_of(batch.cu_seqlens, 4, rank)
        tokens[mine] = shard.tokens_t
        scored[mine] = shard.spread(shard.batch.labels_T)
        assert torch.equal(shard.batch.labels_T, batch.labels_T[mine][shard.rows_R])
        assert shard.packed.cu_seqlens_q.tolist() == [0, 8, 32, 48]
        assert shard.packed.max_seqlen_q == 24
    assert torch.equal(tokens, batch.tokens_T)
    assert torch.equal(scored, batch.labels_T * batch.scored_T)


def test_cu_seqlens_of_a_shard_count_its_scored_slots() -> None:
    batch = make_micro_batch([6, 10], seed=1)
    shard = make_shard(batch, cp=1, cp_rank=0, sequence_parallel_ranks=1, device=CPU)
    first, second = int(batch.scored_T[:6].sum()), int(batch.scored_T[6:].sum())
    assert shard.batch.cu_seqlens.tolist() == [0, first, first + second]


def test_a_shard_without_scored_slots_keeps_one() -> None:
    batch = make_micro_batch([4, 4], seed=1, masked=True)
    shard = make_shard(batch, cp=1, cp_rank=0, sequence_parallel_ranks=1, device=CPU)
    assert shard.rows_R.tolist() == [0] and shard.batch.loss_tokens == 0
    assert shard.spread(torch.tensor([7.0])).tolist() == [0.0] * 8


def test_sizes_that_do_not_divide_are_refused() -> None:
    batch = make_micro_batch([8, 6], seed=1)
    with pytest.raises(LayoutError, match=r"2 x cp\(2\) = 4 equal chunks, but one has 6 slots"):
        make_shard(batch, cp=2, cp_rank=0, sequence_parallel_ranks=1, device=CPU)
    with pytest.raises(LayoutError, match=r"slots\(14\) / cp\(1\) = 14 over tp\(4\); .* multiple of 4"):
        make_shard(batch, cp=1, cp_rank=0, sequence_parallel_ranks=4, device=CPU)
