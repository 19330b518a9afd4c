import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algo import weighing
from dapo_megatron.algo.weighing import RATIO_QUANTILES
from dapo_megatron.config import AlgoConfig, CorrectionConfig
from dapo_megatron.measures import values
from dapo_megatron.pack.microbatch import build
from dapo_megatron.types import MiniBatch, TrainSample
from tests.helpers.replicas import Alone, on_replicas

SCOPES = ["token", "prompt", "sample", "constant"]
LENGTH = 40
"""Tokens that a response counts for in scope constant."""
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/algo.json").read_text())["correction"]
PROMPT = 2


def weigh(mini_batches, algo, replicas):
    weighed, measures = weighing.weigh(mini_batches, algo, replicas)
    return weighed, values(measures)


def scoped(scope, **algo):
    return AlgoConfig(loss_scope=scope, scope_length=LENGTH if scope == "constant" else None, **algo)


class Response:
    """Tokens are named by their label, 1000 x index of the response + position. None as difference: no loss token."""

    def __init__(self, index, group, rollout, old, mini_batch=0):
        self.labels = [1000 * (index + 1) + position for position in range(len(old))]
        self.group, self.mini_batch = group, mini_batch
        self.rollout, self.old = torch.tensor(rollout, dtype=torch.float32), torch.tensor(old, dtype=torch.float32)
        self.trained = [not math.isnan(value) for value in rollout]

    @property
    def sample(self):
        return TrainSample(
            token_ids=torch.tensor([0] * PROMPT + self.labels, dtype=torch.int32),
            loss_mask=torch.tensor([False] * PROMPT + self.trained),
            rollout_logprobs=torch.cat([torch.zeros(PROMPT), self.rollout]),
            advantage=0.0,
            group=self.group,
        )


def updates_of(responses, bins, multiple=1):
    """Pack one replica's share: bins[u] are the micro-batches of mini-batch u, each a list of indices of responses."""
    old = {label: value for r in responses for label, value in zip(r.labels, r.old.tolist(), strict=True)}
    result = []
    for mini_batch, rows in enumerate(bins):
        batches = [
            build([responses[index].sample for index in row], sequence_multiple=multiple, total_multiple=1)
            for row in rows
        ]
        loss_tokens = sum(sum(response.trained) for response in responses if response.mini_batch == mini_batch)
        result.append(
            MiniBatch(
                tuple(
                    # What is not a loss token holds nan, unlike the actor's: nothing may look there.
                    replace(batch, old_logprobs_T=torch.tensor([old.get(x, math.nan) for x in batch.labels_T.tolist()]))
                    for batch in batches
                ),
                loss_tokens,
            )
        )
    return result


def by_label(replicas):
    """label -> weight, for the tokens in the loss; labels outside must weigh 0."""
    weights = {}
    for mini_batches in replicas:
        for mini_batch in mini_batches:
            for batch in mini_batch.micro_batches:
                assert batch.weights_T.dtype == torch.float32
                assert (batch.weights_T[~batch.loss_mask_T] == 0).all()
                kept = zip(batch.labels_T[batch.loss_mask_T], batch.weights_T[batch.loss_mask_T], strict=True)
                weights |= {int(label): float(weight) for label, weight in kept}
    return weights


def worked_example():
    logs = [[[math.log(p) for p in tokens] for tokens in GOLDEN[who]] for who in ("engine", "trainer")]
    return [Response(i, group, *pair) for i, (group, *pair) in enumerate(zip(GOLDEN["groups"], *logs, strict=True))]


def test_worked_example_is_measured():
    mini_batches = updates_of(worked_example(), [[[0, 1], [2]]])
    weighed, metrics = weigh(mini_batches, AlgoConfig(), Alone())
    assert metrics.pop("mismatch/kl") == pytest.approx(GOLDEN["mismatch_kl"], rel=1e-6)
    assert metrics.pop("mismatch/abs") == pytest.approx(GOLDEN["mismatch_abs"], rel=1e-6)
    assert metrics.pop("mismatch/abs_max") == pytest.approx(math.log(6), rel=1e-6)
    # of 0.25, 0.5, 1.5, 1.5, 4 and 6
    assert metrics == pytest.approx(dict(zip(RATIO_QUANTILES, [0.25, 1.5, 6.0, 6.0], strict=True)), rel=1e-6)
    assert [mini_batch.loss_tokens for mini_batch in weighed] == [6]
    assert set(by_label([weighed]).values()) == {1.0}
    assert weighed[0].micro_batches[0].scored_T is mini_batches[0].micro_batches[0].scored_T


@pytest.mark.parametrize(
    ("name", "correction", "scope", "expected"),
    [
        (
            "weights_masked_token_scope_prompt",
            CorrectionConfig(kind="masked", band=(0.4, 5.0)),
            "prompt",
            {"correction/weight": 7.5 / 4, "correction/masked": 2 / 6, "tokens": 4},
        ),
        (
            "weights_truncated_token_scope_sample",
            CorrectionConfig(kind="truncated", cap=2.0),
            "sample",
            {"correction/weight": 7.75 / 6, "correction/truncated": 2 / 6, "tokens": 6},
        ),
    ],
)
def test_worked_example_is_corrected_and_weighed(name, correction, scope, expected):
    responses = worked_example()
    algo = AlgoConfig(correction=correction, loss_scope=scope)
    weighed, metrics = weigh(updates_of(responses, [[[0, 1], [2]]]), algo, Alone())
    assert weighed[0].loss_tokens == expected.pop("tokens") == sum(b.loss_tokens for b in weighed[0].micro_batches)
    weights = by_label([weighed])
    result = [weights.get(label, 0.0) for response in responses for label in response.labels]
    assert result == pytest.approx([weight for tokens in GOLDEN[name] for weight in tokens], rel=1e-6)
    assert {key: value for key, value in metrics.items() if key.startswith("correction")} == pytest.approx(
        expected, rel=1e-6
    )
    measured_only = weigh(updates_of(responses, [[[0, 1], [2]]]), AlgoConfig(), Alone())[1]
    assert {key: value for key, value in metrics.items() if key.startswith("mismatch")} == measured_only


def test_everything_masked():
    algo = AlgoConfig(correction=CorrectionConfig(kind="masked", band=(10.0, 11.0)), loss_scope="prompt")
    weighed, metrics = weigh(updates_of(worked_example(), [[[0, 1], [2]]]), algo, Alone())
    assert (weighed[0].loss_tokens, by_label([weighed])) == (0, {})
    assert metrics["correction/masked"] == 1.0
    assert math.isnan(metrics["correction/weight"])


@pytest.mark.parametrize("scope", SCOPES)
def test_no_loss_tokens_at_all(scope):
    weighed, metrics = weigh(updates_of([], [[[]]]), scoped(scope), Alone())
    assert (weighed[0].loss_tokens, by_label([weighed])) == (0, {})
    assert math.isnan(metrics["mismatch/kl"])
    assert math.isnan(metrics["mismatch/ratio_p50"])


def test_a_wrong_count_of_packing_stays_wrong():
    """The actor compares it with its own count of the masks: it must not be replaced by another count of them."""
    algo = AlgoConfig(correction=CorrectionConfig(kind="masked", band=(0.4, 5.0)))
    mini_batches = [replace(mini_batch, loss_tokens=7) for mini_batch in updates_of(worked_example(), [[[0, 1, 2]]])]
    assert weigh(mini_batches, algo, Alone())[0][0].loss_tokens == 5


def test_nan_is_seen():
    responses = worked_example()
    responses[1].old[0] = math.nan
    algo = AlgoConfig(correction=CorrectionConfig(kind="masked"))
    weighed, metrics = weigh(updates_of(responses, [[[0, 1, 2]]]), algo, Alone())
    assert math.isnan(metrics["mismatch/kl"])
    assert math.isnan(metrics["mismatch/ratio_p999"])
    assert math.isnan(by_label([weighed])[responses[1].labels[0]])


def test_old_logprobs_are_demanded():
    mini_batch = updates_of(worked_example(), [[[0, 1, 2]]])[0]
    bare = replace(mini_batch, micro_batches=tuple(replace(b, old_logprobs_T=None) for b in mini_batch.micro_batches))
    with pytest.raises(AssertionError, match="old log-probs"):
        weigh([bare], AlgoConfig(), Alone())


difference = st.floats(-3, 3, width=32) | st.just(math.nan)  # nan: not a loss token
response = st.tuples(st.integers(0, 3), st.integers(0, 1), st.lists(difference, max_size=6))
CORRECTIONS = [
    CorrectionConfig(),
    CorrectionConfig(kind="truncated", cap=1.5),
    CorrectionConfig(kind="truncated", level="sequence", cap=1.5),
    CorrectionConfig(kind="masked", band=(0.5, 2.0)),
    CorrectionConfig(kind="masked", level="sequence", band=(0.5, 2.0)),
]


def responses_of(drawn):
    return [
        Response(
            index,
            group,
            [math.nan if math.isnan(x) else -1.0 - index / 7 for x in differences],
            [math.nan if math.isnan(x) else -1.0 - index / 7 + x for x in differences],
            mini_batch,
        )
        for index, (group, mini_batch, differences) in enumerate(drawn)
    ]


def expected_of(responses, correction, scope, mini_batch):
    """label -> weight by plain loops over responses, and N."""
    kept = []
    for index, response in enumerate(responses):
        if response.mini_batch != mini_batch:
            continue
        logs = [float(o) - float(r) for o, r in zip(response.old, response.rollout, strict=True)]
        total = sum(x for x in logs if not math.isnan(x))
        for label, log in zip(response.labels, logs, strict=True):
            importance = math.exp(total if correction.level == "sequence" else log)
            if correction.kind == "truncated":
                weight = min(importance, correction.cap)
            else:
                weight = importance if correction.kind == "masked" else 1.0
            outside = importance < correction.band[0] or importance > correction.band[1]
            if not math.isnan(log) and not (correction.kind == "masked" and outside):
                kept.append(({"token": 0, "prompt": response.group}.get(scope, index), label, weight))
    sizes = {}
    for part, *_ in kept:
        sizes[part] = sizes.get(part, 0) + 1
    if scope == "constant":
        return {label: weight * len(kept) / len(sizes) / LENGTH for _, label, weight in kept}, len(kept)
    # mean over parts of the mean over a part's tokens, times N
    return {label: weight * len(kept) / len(sizes) / sizes[part] for part, label, weight in kept}, len(kept)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weights_counts_and_metrics_do_not_depend_on_the_layout(data):
    responses = responses_of(data.draw(st.lists(response, max_size=8)))
    correction = data.draw(st.sampled_from(CORRECTIONS))
    scope = data.draw(st.sampled_from(SCOPES))
    algo = scoped(scope, correction=correction)

    together = [[[i for i, r in enumerate(responses) if r.mini_batch == mini_batch]] for mini_batch in (0, 1)]
    whole, metrics = weigh(updates_of(responses, together), algo, Alone())
    weights = by_label([whole])
    wanted = [expected_of(responses, correction, scope, mini_batch) for mini_batch in (0, 1)]
    assert weights == pytest.approx(wanted[0][0] | wanted[1][0], rel=1e-6)
    assert [mini_batch.loss_tokens for mini_batch in whole] == [count for _, count in wanted]

    replicas, micro_batches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    bins = [[[[] for _ in range(micro_batches)] for _ in (0, 1)] for _ in range(replicas)]
    for index in data.draw(st.permutations(range(len(responses)))):
        place = bins[data.draw(st.integers(0, replicas - 1))][responses[index].mini_batch]
        place[data.draw(st.integers(0, micro_batches - 1))].append(index)
    multiple = data.draw(st.sampled_from([1, 4]))
    shares = [updates_of(responses, share, multiple) for share in bins]
    spread = on_replicas(lambda mini_batches, members: weigh(mini_batches, algo, members), shares)

    assert by_label([mini_batches for mini_batches, _ in spread]) == weights
    for mini_batches, others in spread:
        assert [mini_batch.loss_tokens for mini_batch in mini_batches] == [
            mini_batch.loss_tokens for mini_batch in whole
        ]
        assert others == pytest.approx(metrics, rel=1e-12, abs=1e-15, nan_ok=True)
        exact = [*RATIO_QUANTILES, "mismatch/abs_max"]
        assert str([others[name] for name in exact]) == str([metrics[name] for name in exact])


def test_an_empty_replica_makes_the_same_few_calls():
    calls = []

    def work(mini_batches, members):
        count = 0

        class Counting:
            def sum(self, values):
                nonlocal count
                count += 1
                return members.sum(values)

            def max(self, values):
                nonlocal count
                count += 1
                return members.max(values)

        result = weigh(mini_batches, AlgoConfig(loss_scope="prompt"), Counting())
        calls.append(count)
        return result

    responses = worked_example()
    full = updates_of(responses, [[[index] for index in (0, 1, 2)]])
    empty = updates_of(responses, [[[], [], []]])
    (first, metrics), (second, same) = on_replicas(work, [full, empty])
    assert metrics == same == weigh(full, AlgoConfig(), Alone())[1]
    assert first[0].loss_tokens == second[0].loss_tokens == 6
    assert calls[0] == calls[1] <= 10
