from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron import config_file, eval_command
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.eval_command import evaluate_model, find_model, label, output_folder
from dapo_megatron.preflight import preflight_eval
from dapo_megatron.reward.math import Grade, Rule, grade
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.types import Completion, FinishReason, Prompt
from tests.helpers.checkpoint import values, write_checkpoint, write_prompts
from tests.helpers.completions import read, written


class InProcess:
    """Grades as `GradingPool` does, without processes."""

    def __init__(self, rule: Rule, workers: int, timeout_seconds: float) -> None:
        self.rule: Rule = rule

    async def grade(self, items: Sequence[tuple[str, str]]) -> list[Grade]:
        return [grade(response, answer, self.rule) for response, answer in items]

    def close(self) -> None: ...


@dataclass
class Fake:
    """Engines whose responses follow from the seeds; they die after `lives` prompts."""

    lives: int = 1000
    asked: list[tuple[str, Sampling, int]] = field(default_factory=list)
    version = 0
    closed = False

    def wait_ready(self) -> None: ...

    def sample(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int) -> list[Completion]:
        self.asked.append((prompt.uid, sampling, n))
        assert sampling.seed is not None
        if len(self.asked) > self.lives:
            await asyncio.sleep(0.3)
            raise EngineError("engine 0 died")
        await asyncio.sleep(sampling.seed % 7 / 1000)
        texts = ("so 3. Answer: 3", "Answer: 3.", "it grows", "Answer: 2")
        return [
            written(texts[(sampling.seed + place) % 4], FinishReason.LENGTH if place == 1 else FinishReason.STOP)
            for place in range(n)
        ]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(eval_command, "GradingPool", InProcess)
    monkeypatch.setattr(eval_command, "decoder", lambda tokenizer: read)
    given = values(tmp_path)
    data = str(write_prompts(tmp_path / "heldout.jsonl", "1+1=", "2+1=", "3+0=", "4+1=", "5+1="))
    given["eval"] = {"samples": 3, "top_p": 0.7, "sets": {"sums": {"data": data}, "all": {"data": data, "top_p": 1.0}}}
    return config_file.parse(given)


def measure(config: Config, folder: Path, engines: Fake, said: list[str] | None = None) -> dict[str, Any]:
    checked = preflight_eval(config)
    say = [].append if said is None else said.append
    return evaluate_model(config, checked, folder, say, lambda config, folder: engines).results


def test_sets_have_their_own_sampling_and_both_rules_beside_one_another(config: Config, tmp_path: Path) -> None:
    engines, said = Fake(), list[str]()
    results = measure(config, tmp_path / "out", engines, said)
    assert engines.closed
    assert {(how.top_p, n) for _, how, n in engines.asked} == {(0.7, 3), (1.0, 3)}
    # The same prompt has the same seed under both, so that a comparison is paired.
    seeds = {(uid, how.seed) for uid, how, _ in engines.asked}
    assert len(engines.asked) == 10 and len(seeds) == 5
    found = results["sets"]["all"]
    assert (found["problems"], found["samples"], found["top_p"], found["rule"]) == (5, 3, 1.0, "dapo")
    rows = [json.loads(line) for line in (tmp_path / "out/all.jsonl").read_text().splitlines()]
    for rule in ("dapo", "lenient"):
        right = [row["grades"][rule]["correct"] for row in rows]
        assert found["rules"][rule]["metrics"]["avg@3"]["value"] == pytest.approx(sum(right) / 15)
    only_lenient = [row for row in rows if row["text"] == "Answer: 3."]
    assert found["differ"] == {"dapo and lenient": {"only dapo": 0, "only lenient": len(only_lenient)}}
    differing = (tmp_path / "out/all.differ.jsonl").read_text().splitlines()
    assert len(differing) == len(only_lenient) > 0
    assert found["truncated"] == pytest.approx(1 / 3)
    assert found["length"]["quantiles"]["1.0"] == len("so 3. Answer: 3")
    assert json.loads((tmp_path / "out/results.json").read_text())["sets"] == json.loads(json.dumps(results["sets"]))
    assert "avg@3" in (tmp_path / "out/results.txt").read_text()
    assert said[0] == "sums: 5 prompts x 3 responses"


@pytest.mark.parametrize("lives", [0, 3, 7])
def test_stopped_in_the_middle_and_started_again_it_comes_to_the_same(
    config: Config, tmp_path: Path, lives: int
) -> None:
    measure(config, tmp_path / "whole", Fake())
    with pytest.raises(EngineError):
        measure(config, tmp_path / "parts", Fake(lives))
    assert not (tmp_path / "parts/results.json").exists()
    again, said = Fake(), list[str]()
    measure(config, tmp_path / "parts", again, said)
    assert len(again.asked) == 10 - lives
    assert lives == 0 or any("done already: " in line for line in said)
    for name in ("sums.jsonl", "all.jsonl", "all.differ.jsonl", "results.json", "results.txt", "settings.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_where_nothing_is_missing_no_engine_is_started(config: Config, tmp_path: Path) -> None:
    first = measure(config, tmp_path / "out", Fake())
    checked = preflight_eval(config)
    told = evaluate_model(config, checked, tmp_path / "out", print, lambda *_: pytest.fail("an engine was started"))
    assert json.dumps(told.results) == json.dumps(first)


def test_other_settings_and_other_weights_are_refused(config: Config, tmp_path: Path) -> None:
    measure(config, tmp_path / "out", Fake())
    hotter = config.model_copy(update={"eval": config.eval.model_copy(update={"temperature": 0.6})})
    with pytest.raises(ConfigError, match=r"sums.temperature: 1.0 there, 0.6 here"):
        measure(hotter, tmp_path / "out", Fake())
    weights = config.model.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ConfigError, match=r"\n  model: [0-9a-f]{16} there, [0-9a-f]{16} here\n"):
        measure(config, tmp_path / "out", Fake())


def test_truncated_is_wrong_for_every_rule(config: Config, tmp_path: Path) -> None:
    strict = config.model_copy(update={"reward": config.reward.model_copy(update={"truncated_is_wrong": True})})
    measure(strict, tmp_path / "out", Fake())
    rows = [json.loads(line) for line in (tmp_path / "out/all.jsonl").read_text().splitlines()]
    assert not any(found["correct"] for row in rows if row["truncated"] for found in row["grades"].values())
    assert any(found["correct"] for row in rows for found in row["grades"].values())


def test_a_folder_that_cannot_be_made_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the evaluation to .*file/out: Not a directory"):
        measure(config, tmp_path / "file/out", Fake())


def test_a_folder_in_that_of_the_model_is_refused(config: Config, tmp_path: Path) -> None:
    before = sorted(config.model.path.iterdir())
    (tmp_path / "link").symlink_to(config.model.path)
    for folder in (config.model.path, tmp_path / "link", config.model.path / "evaluation"):
        with pytest.raises(ConfigError, match=r"into the folder of the model itself, .*: --out DIR"):
            measure(config, folder, Fake())
    assert sorted(config.model.path.iterdir()) == before


def a_run(folder: Path, *, hf: bool = False, exported: bool = False, steps: Sequence[int] = ()) -> Path:
    for step in steps:
        checkpoint = folder / f"checkpoints/step-{step}"
        (checkpoint / "hf").mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        (checkpoint / "hf/config.json").write_text("{}")
        if exported:
            (checkpoint / "hf/model.safetensors").write_text("")
    if hf:
        write_checkpoint(folder / "hf")
    return folder


def test_the_model_of_a_run_is_found(tmp_path: Path) -> None:
    assert find_model(write_checkpoint(tmp_path / "Qwen")) == tmp_path / "Qwen"
    assert find_model(a_run(tmp_path / "over", hf=True, steps=[2])) == tmp_path / "over/hf"
    newest = a_run(tmp_path / "going", exported=True, steps=[2, 10, 4])
    assert find_model(newest) == newest / "checkpoints/step-10/hf"
    assert find_model(newest / "checkpoints/step-4") == newest / "checkpoints/step-4/hf"


def test_a_run_with_megatron_checkpoints_only_is_told_how_to_convert_them(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a run", steps=[2, 4])
    for given, step in ((run, 4), (run / "checkpoints/step-2", 2)):
        with pytest.raises(ConfigError) as error:
            find_model(given)
        (command,) = re.findall(r"dapo-megatron convert .*", str(error.value))
        words = [str(run / f"checkpoints/step-{step}"), str(tmp_path / f"a_run-step-{step}-hf")]
        assert shlex.split(command) == ["dapo-megatron", "convert", *words]


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_what_is_no_model_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match=f"--model .*{folder}"):
        find_model(tmp_path / folder)


def test_an_evaluation_is_named_for_its_model(config: Config, tmp_path: Path) -> None:
    assert output_folder(config) == tmp_path / "runs/test-eval/model"
    assert label(Path("runs/my run/hf")) == "my_run"
