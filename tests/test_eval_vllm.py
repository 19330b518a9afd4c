"""`dapo-megatron eval` with a real engine, killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from examples.quickstart import sums
from tests.test_train import write_material

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]


def write_config(folder: Path) -> Path:
    material = write_material(folder)
    held_out, _ = sums.split(seed=0, held_out=16, train=8)
    sums.write(material / "heldout.jsonl", held_out)
    data = str(material / "heldout.jsonl")
    values = {
        "model": {"path": str(material / "base"), "dtype": "float32"},
        "data": {"train": "nowhere.jsonl", "max_prompt_tokens": 16},
        "rollout": {"max_response_tokens": 16},
        "reward": {"overlong": {"cache": 16}, "workers": 1},
        # Nothing that an evaluation needs, and nothing that could train here.
        "parallel": {"tp": 64},
        "optimizer": {"lr": 3.0},
        "eval": {"samples": 2, "sets": {"sums": {"data": data, "top_p": 0.7}, "all": {"data": data}}},
        "engine": {"max_sequences": 4},
        "run": {"dir": str(folder), "name": "run"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(config: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "dapo_megatron", "eval", str(config), "--out", str(out)]


def test_killed_in_the_middle_it_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    config, whole, parts = write_config(tmp_path), tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run(command(config, whole), capture_output=True, text=True, timeout=400, check=True)
    results = json.loads(done.stdout)["sets"]
    assert results["all"]["problems"] == 16 and results["sums"]["top_p"] == 0.7

    rows = parts / "sums.jsonl"
    process = subprocess.Popen(command(config, parts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (rows.exists() and rows.stat().st_size) and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (parts / "results.json").exists()
    finished = len(rows.read_text().splitlines())
    assert 0 < finished < 16 * 2

    again = subprocess.run(command(config, parts), capture_output=True, text=True, timeout=400, check=True)
    assert f"sums: 16 prompts x 2 responses; done already: {finished // 2} prompt" in again.stderr
    assert again.stdout == done.stdout
    for name in ("sums.jsonl", "all.jsonl", "sums.differ.jsonl", "results.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
