import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algo import scope

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/algo.json").read_text())["token_mean_scope"]
SCOPES = ["token", "prompt", "sample"]


def weights(of, tokens, groups, *, cuts=()):
    """The weight of each segment, where the segments are split into replicas at `cuts`."""
    shares = [slice(start, end) for start, end in pairwise([0, *sorted(cuts), len(tokens)])]
    tokens_S, groups_S = torch.tensor(tokens, dtype=torch.int64), torch.tensor(groups, dtype=torch.int64)
    count = max(groups, default=0) + 1
    totals = torch.stack([scope.counts(of, tokens_S[share], groups_S[share], count) for share in shares]).sum(0)
    parts = [scope.weights(of, tokens_S[share], groups_S[share], totals, sum(tokens)) for share in shares]
    return torch.cat(parts).tolist()


@pytest.mark.parametrize(
    ("of", "loss", "token_weight"),
    [
        ("token", "minibatch_global", "weight_of_one_token_global"),
        ("prompt", "per_group_then_mean", "weight_of_one_token_per_group"),
        ("sample", "sample_level", "weight_of_one_token_sample"),
    ],
)
def test_worked_scopes(of, loss, token_weight):
    lengths = GOLDEN["lengths"]
    result = weights(of, lengths, [0, 0, 1, 1])
    total = sum(lengths)
    mean = sum(-a * w * n for a, w, n in zip(GOLDEN["A"], result, lengths, strict=True)) / total
    assert mean == pytest.approx(GOLDEN[loss], abs=1e-9)
    assert [weight / total for weight in result] == pytest.approx(GOLDEN[token_weight], abs=1e-12)


def test_segments_without_loss_tokens_do_not_count():
    assert weights("token", [2, 0, 4], [0, 0, 0]) == [1.0, 0.0, 1.0]
    assert weights("sample", [2, 0, 4], [0, 0, 0]) == [1.5, 0.0, 0.75]
    assert weights("prompt", [2, 0, 4, 0], [0, 1, 2, -1]) == [1.5, 0.0, 0.75, 0.0]


def test_dr_grpo_divides_by_responses_times_a_constant():
    tokens_S, groups_S = torch.tensor([2, 0, 4]), torch.tensor([0, 0, 1])
    totals = scope.counts("constant", tokens_S, groups_S, 2)
    weights_S = scope.weights("constant", tokens_S, groups_S, totals, 6, 10)
    # of 6 tokens in 2 responses: 6 x 1 / (2 x 10)
    assert weights_S.tolist() == pytest.approx([0.3, 0.0, 0.3])
    assert scope.weights("constant", tokens_S * 0, groups_S, totals * 0, 0, 10).tolist() == [0, 0, 0]


@pytest.mark.parametrize("of", SCOPES)
def test_without_any_loss_tokens_all_weights_are_0(of):
    assert weights(of, [0, 0], [-1, 3]) == [0.0, 0.0]


segment = st.tuples(st.integers(0, 50), st.integers(0, 5), st.floats(-2, 2))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCOPES), st.lists(segment, min_size=1, max_size=20), st.lists(st.integers(0, 20), max_size=3))
def test_mean_of_the_scope_however_segments_are_spread(of, segments, cuts):
    tokens, groups, losses = ([segment[field] for segment in segments] for field in range(3))
    result = weights(of, tokens, groups, cuts=[min(cut, len(tokens)) for cut in cuts])
    assert result == weights(of, tokens, groups)
    total = sum(tokens)
    assert sum(w * n for w, n in zip(result, tokens, strict=True)) == pytest.approx(total)
    if total:
        parts = {}
        for index, (n, group, loss) in enumerate(segments):
            if n:
                parts.setdefault({"token": 0, "prompt": group, "sample": index}[of], []).extend([loss] * n)
        naive = sum(sum(part) / len(part) for part in parts.values()) / len(parts)
        weighed = sum(w * n * loss for w, n, loss in zip(result, tokens, losses, strict=True)) / total
        assert weighed == pytest.approx(naive, abs=1e-9)
