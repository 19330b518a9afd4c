from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dapo_megatron.obs.metrics import METRICS, PHASES, step_metrics
from dapo_megatron.rollout.collect import RolloutStats
from dapo_megatron.types import StepResult

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


def result(tokens: int, **changes: Any) -> StepResult:
    metrics = {"clip_fraction_high": 0.1, "clip_fraction_low": 0.0, "ratio": 1.0, "ratio_max": 1.5, "kl_old": 0.0}
    values = {"loss": 0.0, "grad_norm": 1.0, "lr": 1e-6, "loss_tokens": tokens, "metrics": metrics, **changes}
    return StepResult(**values)


def test_a_step_of_two_updates() -> None:
    metrics = step_metrics(
        STATS,
        {"entropy": 0.5, "mismatch_kl": 1e-9, "mismatch_abs": 1e-5, "mismatch_abs_max": 1e-4},
        [
            result(100, loss=1.0, grad_norm=2.0, metrics={"ratio": 1.0, "ratio_max": 7.0}),
            result(300, loss=-1.0, grad_norm=4.0, lr=2e-6, metrics={"ratio": 2.0, "ratio_max": 3.0}),
        ],
    )
    assert metrics["loss"] == pytest.approx((100 - 300) / 400)
    assert metrics["ratio/mean"] == pytest.approx((100 + 600) / 400)
    assert metrics["ratio/max"] == 7.0
    assert (metrics["grad_norm"], metrics["lr"], metrics["loss_tokens"]) == (3.0, 2e-6, 400)
    assert metrics["groups/discarded"] == 9
    assert metrics["tokens_per_second"] == 4500
    assert metrics["mismatch/abs_max"] == 1e-4


def test_every_name_has_its_meaning() -> None:
    policy = {"entropy": 0.5, "mismatch_kl": 0.0, "mismatch_abs": 0.0, "mismatch_abs_max": 0.0}
    assert set(step_metrics(STATS, policy, [result(1)])) <= set(METRICS)
    assert {f"seconds/{phase}" for phase in PHASES} <= set(METRICS)


def test_updates_without_tokens_have_no_mean() -> None:
    metrics = step_metrics(STATS, {}, [result(0)])
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["grad_norm"])
    assert "ratio/max" not in metrics
    assert metrics["updates/skipped"] == 0


def test_a_skipped_update_is_counted_and_in_no_mean() -> None:
    skipped = replace(result(50), loss=math.nan, grad_norm=math.inf, skipped="loss is nan")
    metrics = step_metrics(STATS, {}, [skipped, result(10), result(0)])
    assert metrics["updates/skipped"] == 1
    alone = step_metrics(STATS, {}, [result(10)])
    assert alone.pop("ratio/first_max") == 1.5
    assert metrics == {**alone, "updates/skipped": 1}


def test_a_new_measure_keeps_its_name() -> None:
    assert step_metrics(STATS, {"surprise": 2.0}, [])["surprise"] == 2.0
