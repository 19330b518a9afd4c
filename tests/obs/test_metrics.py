from __future__ import annotations

import math

import pytest

from dapo_megatron.measures import Max, Mean
from dapo_megatron.obs.metrics import METRICS, PHASES, step_metrics
from dapo_megatron.pack import PackStats
from dapo_megatron.rollout.collect import RolloutStats
from dapo_megatron.types import UpdateResult

STATS = RolloutStats(
    generation_batches=2,
    all_right=3,
    all_wrong=20,
    discarded=9,
    accuracy=0.25,
    reward=-0.5,
    length=21.5,
    truncated=0.125,
    truncated_right=0.5,
    timed_out=2,
    staleness=0.25,
    tokens=9000,
    seconds=2.0,
)


PACKING = PackStats(waste=0.01, imbalance_tokens=0.0, imbalance_cost=0.0, micro_batches=2.0)


def result(tokens: int, *, lr: float = 1e-6, skipped: str | None = None, **measures: float) -> UpdateResult:
    found = {"loss": 0.0, "ratio": 1.0, "highest": 1.5, "grad_norm": 1.0, **measures}
    return UpdateResult(
        {
            "loss": Mean(found["loss"] * tokens, tokens),
            "ratio/mean": Mean(found["ratio"] * tokens, tokens),
            "ratio/max": Max(found["highest"]),
            "grad_norm": Mean(found["grad_norm"]),
        },
        loss_tokens=tokens,
        lr=lr,
        skipped=skipped,
    )


def test_a_step_of_two_updates() -> None:
    metrics = step_metrics(
        STATS,
        PACKING,
        {"entropy": Mean(1.0, 2), "mismatch/abs_max": Max(1e-4)},
        [
            result(100, loss=1.0, grad_norm=2.0, highest=7.0),
            result(300, loss=-1.0, grad_norm=4.0, ratio=2.0, highest=3.0, lr=2e-6),
        ],
    )
    assert metrics["loss"] == pytest.approx((100 - 300) / 400)
    assert metrics["ratio/mean"] == pytest.approx((100 + 600) / 400)
    assert metrics["ratio/max"] == metrics["ratio/first_max"] == 7.0
    assert (metrics["grad_norm"], metrics["lr"], metrics["loss_tokens"]) == (3.0, 2e-6, 400)
    assert metrics["groups/discarded"] == 9
    assert metrics["tokens_per_second"] == 4500
    assert (metrics["entropy"], metrics["mismatch/abs_max"], metrics["pack/micro_batches"]) == (0.5, 1e-4, 2.0)


def test_every_phase_has_its_meaning() -> None:
    assert {f"seconds/{phase}" for phase in PHASES} <= set(METRICS)


def test_updates_without_tokens_have_no_mean() -> None:
    metrics = step_metrics(STATS, PACKING, {}, [result(0)])
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["grad_norm"])
    assert "ratio/max" not in metrics
    assert metrics["updates/skipped"] == 0


def test_a_skipped_update_is_counted_and_in_no_mean() -> None:
    skipped = result(50, loss=math.nan, grad_norm=math.inf, skipped="loss is nan")
    metrics = step_metrics(STATS, PACKING, {}, [skipped, result(10), result(0)])
    assert metrics["updates/skipped"] == 1
    alone = step_metrics(STATS, PACKING, {}, [result(10)])
    assert alone.pop("ratio/first_max") == 1.5
    assert metrics == {**alone, "updates/skipped": 1}
