"""Whole runs of a model with experts that are spread over ranks: the engine follows, and another layout goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from examples.quickstart import sums
from tests.helpers.lives import differences, live, metrics, steps_of, write_config
from tests.helpers.models import save_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.long, pytest.mark.timeout(1800)]

# Heads that vLLM has kernels for.
SIZES: dict[str, Any] = {"hidden": 128, "head_dim": 64, "moe_intermediate_size": 64, "intermediate_size": 160}


def make_config(folder: Path) -> Path:
    tokenizer = sums.tokenizer()
    save_tiny(folder / "base", "qwen3_moe", tied=False, vocab_size=32, eos_token_id=tokenizer.eos_token_id, **SIZES)
    tokenizer.save_pretrained(folder / "base")
    sums.write(folder / "train.jsonl", sums.split(seed=0, held_out=8, train=64)[1])
    values: dict[str, Any] = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "parallel": {"ep": 2},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts": 4, "responses": 8, "max_response_tokens": 32, "dynamic_sampling": False},
        "reward": {"overlong": {"cache": 32}, "workers": 1},
        "train": {"steps": 3, "mini_batch": 16, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
        "checkpoint": {"every": 2},
        "run": {"dir": str(folder), "name": "run"},
    }
    return write_config(folder, values)


def test_a_run_of_experts_goes_on_as_if_nothing_had_happened_and_in_another_layout(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert live(config) == 0
    undisturbed = tmp_path / "run"
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["mismatch/abs_max"] <= 2e-5
        assert row["grad_norm"] > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", undisturbed / "hf"))
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before)

    assert live(config, "run.name=killed", place="update", call=5) == -9
    assert live(config, "run.name=killed") == 0
    assert steps_of(tmp_path / "killed") == [2]
    assert differences(tmp_path / "killed", undisturbed) == []

    assert live(config, "run.name=moved", place="update", call=5) == -9
    assert live(config, "run.name=moved", "parallel.ep=1", "parallel.pp=2") == 0
    last, moved = rows[-1], metrics(tmp_path / "moved")[-1]
    for name in ("loss", "grad_norm", "entropy"):
        assert moved[name] == pytest.approx(last[name], rel=1e-4), name
