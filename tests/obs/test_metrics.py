from __future__ import annotations

import math

import pytest

from dapo_megatron.measures import Max, Mean
from dapo_megatron.obs.metrics import METRICS, PHASES, step_metrics
from dapo_megatron.types import UpdateResult


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
    assert (metrics["entropy"], metrics["mismatch/abs_max"]) == (0.5, 1e-4)


def test_every_phase_has_its_meaning() -> None:
    assert {f"seconds/{phase}" for phase in PHASES} <= set(METRICS)


def test_updates_without_tokens_have_no_mean() -> None:
    metrics = step_metrics({}, [result(0)])
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["grad_norm"])
    assert "ratio/max" not in metrics
    assert metrics["updates/skipped"] == 0


def test_a_skipped_update_is_counted_and_in_no_mean() -> None:
    skipped = result(50, loss=math.nan, grad_norm=math.inf, skipped="loss is nan")
    metrics = step_metrics({}, [skipped, result(10), result(0)])
    assert metrics["updates/skipped"] == 1
    alone = step_metrics({}, [result(10)])
    assert alone.pop("ratio/first_max") == 1.5
    assert metrics == {**alone, "updates/skipped": 1}
