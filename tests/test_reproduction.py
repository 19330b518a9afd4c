"""The whole way of examples/qwen2.5_32b, with data as published, the 32B recipe's settings and a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dapo_megatron import config_file
from tests.helpers.answers import save_answering, stop_tokens
from tests.helpers.recipe import RECIPE, ROOT

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.multiproc, pytest.mark.slow]

TINY = [
    *("model.dtype=float32", "launch.processes=2", "parallel.tp=2", "engine.count=1", "engine.tensor_parallel=1"),
    *("rollout.prompts=8", "rollout.responses=8", "rollout.generation_batch=8", "rollout.max_response_tokens=48"),
    *("reward.overlong.cache=16", "reward.workers=1", "train.mini_batch=16", "train.micro_batch_tokens=4096"),
    *("optimizer.lr=2e-2", "run.tensorboard=false", "checkpoint.every=1", "eval.every=1"),
]
"""At this rate, three steps of the recipe's warm-up change what a tiny model answers."""


def publish(path: Path, problems: int, copies: int, of: str) -> None:
    """Writes rows as those of DAPO-Math-17k and AIME-2024 on the hub are: repeated, in a chat message, in the text."""
    template = config_file.load(RECIPE).data.template
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": template.replace("{problem}", f"What is {n} - {n - 1}, in {of}?")}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "1", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(n)},
        }
        for n in range(2, problems + 2)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows * copies), path)


def command(*words: object, code: int = 0) -> str:
    """Runs a program of the project. Returns what it says on standard output."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1_200)
def test_from_published_rows_to_a_comparison_of_checkpoints(tmp_path: Path) -> None:
    raw, data, model, base = tmp_path / "raw", tmp_path / "data", tmp_path / "model", tmp_path / "base"
    raw.mkdir()
    publish(raw / "dapo-math-17k.parquet", problems=24, copies=3, of="apples")
    publish(raw / "aime-2024.parquet", problems=4, copies=32, of="pears")
    save_answering(model)

    words = ("--from", raw, "--eval", "aime-2024", "--config", RECIPE, "--tokenizer", model)
    command("tools/prepare_data.py", data, *words)
    assert [parquet.read_metadata(data / f"{name}.parquet").num_rows for name in ("train", "aime-2024")] == [24, 4]

    command("tools/hf_to_megatron.py", model, tmp_path / "megatron", "--tp", 2, "--verify")
    command("tools/megatron_to_hf.py", tmp_path / "megatron", base, "--verify")

    sets = [f"eval.sets.{name}.data={data}/aime-2024.parquet" for name in ("aime2024", "aime2024-p1")]
    given = [f"data.train={data}/train.parquet", *sets, stop_tokens()]
    config = [RECIPE, *TINY, *given, f"model.path={base}", f"run.dir={tmp_path}", "run.name=run"]
    train = ["-m", "dapo_megatron", "train"]
    command(*train, *config, "train.steps=2")
    command(*train, "--resume", *config, "train.steps=3")
    rows = metrics(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["groups/kept"] == 8 and row["mismatch/abs_max"] < 2e-5 for row in steps)

    evaluate = ["-m", "dapo_megatron", "eval"]
    folders = [tmp_path / "eval-before", tmp_path / "eval-after"]
    for folder, measured in zip(folders, (base, tmp_path / "run"), strict=True):
        command(*evaluate, *config, "--model", measured, "--out", folder)
    compared = json.loads(command(*evaluate, "--compare", *folders, "--json"))
    averages = compared["sets"]["aime2024-p1"]["dapo"]["avg@32"]
    assert averages["difference"] == pytest.approx(averages["second"] - averages["first"])
    assert averages["difference"] != 0, "the same requests are answered by other weights"
