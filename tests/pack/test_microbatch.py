import torch

from dapo_megatron.pack.microbatch import build, slots, widths
from dapo_megatron.types import TrainSample


def sample(tokens, prompt, advantage, group=0):
    mask = torch.arange(len(tokens)) >= prompt
    logprobs = torch.where(mask, -torch.arange(len(tokens)) / 4, 0.0)
    return TrainSample(torch.tensor(tokens, dtype=torch.int32), mask, logprobs, advantage, group)


FIRST = sample([7, 10, 3, 11, 10, 2], 4, 0.5, group=3)
SECOND = sample([5, 6, 2], 1, -1.5, group=8)
ONE_TOKEN = sample([4], 1, 1.0, group=5)


def test_inputs_beside_their_labels():
    batch = build([FIRST, SECOND], sequence_multiple=1, total_multiple=1)
    assert batch.tokens_T.tolist() == [7, 10, 3, 11, 10, 5, 6]
    assert batch.labels_T.tolist() == [10, 3, 11, 10, 2, 6, 2]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 7]
    assert batch.loss_mask_T.tolist() == [False, False, False, True, True, True, True]
    assert batch.rollout_logprobs_T.tolist() == [0.0, 0.0, 0.0, -1.0, -1.25, -0.25, -0.5]
    assert batch.advantages_T.tolist() == [0.5] * 5 + [-1.5] * 2
    assert batch.weights_T.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert batch.groups_S.tolist() == [3, 8]
    assert {t.dtype for t in (batch.tokens_T, batch.labels_T, batch.positions_T, batch.groups_S)} == {torch.int64}
    assert (batch.cu_seqlens.dtype, batch.loss_mask_T.dtype) == (torch.int32, torch.bool)
    assert {t.dtype for t in (batch.advantages_T, batch.weights_T, batch.rollout_logprobs_T)} == {torch.float32}


def test_padding_follows_its_sequence_and_the_rest_follows_the_last():
    batch = build([FIRST, SECOND], sequence_multiple=4, total_multiple=5)
    assert batch.cu_seqlens.tolist() == [0, 8, 20]
    assert batch.tokens_T.tolist() == [7, 10, 3, 11, 10, 0, 0, 0, 5, 6] + [0] * 10
    assert batch.labels_T.tolist() == [10, 3, 11, 10, 2, 0, 0, 0, 6, 2] + [0] * 10
    assert batch.positions_T.tolist() == [*range(8), *range(12)]
    assert batch.loss_mask_T.nonzero().flatten().tolist() == [3, 4, 8, 9]
    assert batch.weights_T.tolist() == batch.loss_mask_T.tolist()
    assert batch.rollout_logprobs_T[[3, 4, 8, 9]].tolist() == [-1.0, -1.25, -0.25, -0.5]
    assert batch.groups_S.tolist() == [3, 8]


def test_what_is_scored_is_a_mask_of_its_own():
    batch = build([FIRST], sequence_multiple=1, total_multiple=1)
    assert batch.scored_T.tolist() == batch.loss_mask_T.tolist()
    assert batch.scored_T.data_ptr() != batch.loss_mask_T.data_ptr()


def test_without_sequences_one_segment_of_padding():
    batch = build([], sequence_multiple=4, total_multiple=2)
    assert (batch.slots, batch.loss_tokens) == (8, 0)
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert batch.positions_T.tolist() == list(range(8))
    assert batch.tokens_T.tolist() == batch.labels_T.tolist() == [0] * 8
    assert batch.weights_T.tolist() == batch.advantages_T.tolist() == batch.rollout_logprobs_T.tolist() == [0.0] * 8
    assert batch.groups_S.tolist() == [-1]
    assert build([], sequence_multiple=1, total_multiple=1).slots == 1


def test_sequence_of_one_token_predicts_nothing_and_takes_no_slot():
    batch = build([ONE_TOKEN, SECOND, ONE_TOKEN], sequence_multiple=1, total_multiple=1)
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert batch.groups_S.tolist() == [8]
    alone = build([ONE_TOKEN], sequence_multiple=2, total_multiple=1)
    assert (alone.slots, alone.loss_tokens, alone.groups_S.tolist()) == (2, 0, [-1])


def test_widths_are_those_of_the_segments():
    for samples in ([FIRST, SECOND], [ONE_TOKEN, SECOND, ONE_TOKEN], [ONE_TOKEN], []):
        for sequence_multiple, total_multiple in ((1, 1), (2, 1), (4, 5), (8, 2)):
            batch = build(samples, sequence_multiple=sequence_multiple, total_multiple=total_multiple)
            found = widths([sample.length for sample in samples], sequence_multiple, total_multiple)
            assert found == batch.cu_seqlens.diff().tolist()
    assert widths([6, 1, 3], 4, 3) == [8, 4]
    assert widths([6, 3], 4, 5) == [8, 12]
    assert [slots(length, 4) for length in (0, 1, 2, 5, 6)] == [0, 0, 4, 4, 8]
