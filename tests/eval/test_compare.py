from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.compare import compare_folders
from dapo_megatron.eval.record import Graded, Record, Row, Settings
from dapo_megatron.types import Prompt

PROMPTS = [Prompt(f"x:{number}", (number,), f"{number}+0=", str(number)) for number in range(8)]
SETTINGS = Settings(
    {
        "model": "a1",
        "sets": ["aime"],
        "aime.problems": "p",
        "aime.prompts": "t",
        "aime.samples": 2,
        "aime.top_p": 0.7,
        "aime.rules": ["dapo"],
    },
    {},
)


def write(folder: Path, right: int, settings: Settings = SETTINGS) -> Path:
    """An evaluation in which the first sample of the first `right` problems is right, and nothing else."""
    record = Record(folder, settings, {"aime": 2})
    for place, prompt in enumerate(PROMPTS):
        grades = [{"dapo": Graded(place < right and not sample, "3")} for sample in range(2)]
        rows = [Row(prompt.uid, sample, "3", 7, 4, False, grades[sample], "", []) for sample in range(2)]
        record.add("aime", rows)
    record.finish("aime", PROMPTS)
    record.conclude({"sets": {"aime": {"problems": len(PROMPTS)}}}, "")
    return folder


def test_a_difference_and_its_interval(tmp_path: Path) -> None:
    other = replace(SETTINGS, decisive={**SETTINGS.decisive, "model": "b2", "aime.prompts": "u", "aime.top_p": 1.0})
    told = compare_folders(write(tmp_path / "a", 2), write(tmp_path / "b", 6, other))
    found = told.results["sets"]["aime"]["dapo"]
    assert list(found) == ["avg@2", "pass@1", "pass@2", "maj@2"]
    assert (found["avg@2"]["first"], found["avg@2"]["second"], found["avg@2"]["difference"]) == (1 / 8, 3 / 8, 1 / 4)
    assert found["pass@2"]["difference"] == 0.5
    low, high = found["avg@2"]["over_problems"]
    assert 0 < low < 0.25 < high < 0.5
    assert told.results["settings_differ"] == {
        "model": ["a1", "b2"],
        "aime.prompts": ["t", "u"],
        "aime.top_p": [0.7, 1.0],
    }
    assert "aime.prompts: t and u: the models got other tokens" in told.table
    assert "model: a1 and b2" in told.table and "+25.00%" in told.table
    same = compare_folders(tmp_path / "a", tmp_path / "a").results["sets"]["aime"]["dapo"]["maj@2"]
    assert (same["difference"], same["over_problems"]) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [("aime.problems", "q"), ("aime.samples", 4), ("aime.rules", ["dapo", "lenient"]), ("sets", ["math"])],
)
def test_what_differs_in_problems_samples_or_rules_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path / "a", 2)
    other_set = {"math.problems": "p", "math.samples": 2, "math.rules": ["dapo"]}
    write(tmp_path / "b", 2, replace(SETTINGS, decisive={**SETTINGS.decisive, **other_set, key: value}))
    with pytest.raises(ConfigError, match=rf"cannot be compared problem by problem:\n(?s:.*){key}: "):
        compare_folders(tmp_path / "a", tmp_path / "b")


def test_only_finished_evaluations_are_compared(tmp_path: Path) -> None:
    write(tmp_path / "a", 2)
    (tmp_path / "a/results.json").unlink()
    with pytest.raises(ConfigError, match="is not finished"):
        compare_folders(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"holds no evaluation: settings.json is missing"):
        compare_folders(tmp_path, tmp_path / "a")


def test_problems_are_paired_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "a", 2)
    file = write(tmp_path / "b", 2) / "aime.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[8:] + lines[:8]))
    found = compare_folders(tmp_path / "a", tmp_path / "b").results["sets"]["aime"]["dapo"]["avg@2"]
    assert (found["difference"], found["over_problems"]) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("aime.jsonl", None, r"b/aime.jsonl is missing; copy the whole folder again"),
        ("aime.jsonl", 6, r"b/aime.jsonl has the responses to 3 problems, and results.json is about 8; copy"),
        ("aime.jsonl", 7, r"b/aime.jsonl ends within the responses to a prompt"),
        ("aime.jsonl", "other", r"b/aime.jsonl lacks problem x:3, which .*a/aime.jsonl has, although"),
        ("results.json", "{}", r"b/results.json does not say how many problems aime has; copy"),
        ("settings.json", '{"decisive": {}, "origin": {}}', r"b/settings.json is not whole: sets is missing; copy"),
        (
            "settings.json",
            '{"decisive": {"sets": ["aime"]}, "origin": {}}',
            r"b/settings.json is not whole: aime.problems is missing; copy",
        ),
        ("settings.json", '{"decisive', r"b/settings.json is damaged: Invalid JSON: .*; copy it anew"),
        ("settings.json", '{"decisive": {}}', r"b/settings.json is damaged: origin: Field required; copy it anew"),
    ],
)
def test_folders_that_are_not_whole_are_refused(
    tmp_path: Path, file: str, content: str | int | None, message: str
) -> None:
    write(tmp_path / "a", 2)
    path = write(tmp_path / "b", 2) / file
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:content]))
    else:
        path.write_text(path.read_text().replace('"x:3"', '"x:9"') if content == "other" else content)
    with pytest.raises(ConfigError, match=f"^.*{message}") as error:
        compare_folders(tmp_path / "a", tmp_path / "b")
    assert "pydantic" not in str(error.value)
