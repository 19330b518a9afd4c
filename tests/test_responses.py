from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_megatron import cli

GIVEN = [
    {"uid": "a", "answer": "34", "responses": ["Answer: 34", "Answer: 34.", "the answer is 35"]},
    {"uid": "b", "answer": 2, "responses": ["Answer: 3", "Answer: 3", "Answer: 2"], "subject": "sums"},
]


def write(folder: Path, *rows: object) -> Path:
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_responses_that_are_there_are_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, *GIVEN)
    assert cli.main(["eval", "--responses", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["samples"]) == (2, 3)
    values = {
        rule: {name: metric["value"] for name, metric in results["metrics"].items()}
        for rule, results in found["rules"].items()
    }
    third = pytest.approx(1 / 3)
    assert values["dapo"] == {
        "avg@3": third,
        "pass@1": third,
        "pass@2": pytest.approx(2 / 3),
        "pass@3": 1,
        "maj@3": 0.25,
    }
    assert values["lenient"]["avg@3"] == 0.5
    assert [(row["uid"], row["sample"]) for row in found["differing"]] == [("a", 1)]
    assert found["differing"][0]["grades"]["lenient"] == {"correct": True, "extracted": "34"}
    assert "against_labels" not in found
    assert cli.main(["eval", "--responses", str(path)]) == 0
    assert "avg@3" in (shown := capsys.readouterr().out) and not shown.startswith("{")


def test_rules_are_compared_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {**GIVEN[0], "labels": [True, True, True]}, {**GIVEN[1], "labels": [True, False, False]})
    assert cli.main(["eval", "--responses", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against_labels"]["dapo"] == {"right": 2, "accepted_wrongly": 1, "rejected_wrongly": 3}
    assert found["against_labels"]["lenient"] == {"right": 3, "accepted_wrongly": 1, "rejected_wrongly": 2}
    places = [(row["uid"], row["sample"], row["label"]) for row in found["differing"]]
    assert places == [("a", 1, True), ("a", 2, True), ("b", 0, True), ("b", 2, False)]
    assert cli.main(["eval", "--responses", str(path)]) == 0
    assert "rejects, labelled right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"answer": "3", "responses": ["x"]}],
            "responses.jsonl:1: uid: field required; the row has answer, responses",
        ),
        (
            [GIVEN[0], {**GIVEN[1], "answer": 2.5}],
            "responses.jsonl:2: the answer in answer must be text or an integer; got 2.5",
        ),
        (
            [{**GIVEN[0], "answer": None}],
            "responses.jsonl:1: the answer in answer must be text or an integer; got None",
        ),
        ([{**GIVEN[0], "answer": " "}], "responses.jsonl:1: the answer in answer is empty"),
        ([{**GIVEN[0], "uid": 7}, {**GIVEN[0], "uid": "7"}], "responses.jsonl:2: uid: '7' is there already"),
        ([{**GIVEN[0], "responses": []}], "responses.jsonl:1: responses: there is none; give one at least"),
        ([{**GIVEN[0], "responses": "34"}], "responses.jsonl:1: responses: must be a list"),
        ([{**GIVEN[0], "responses": ["34", None]}], "responses.jsonl:1: responses.1: must be text"),
        (
            [GIVEN[0], {**GIVEN[1], "responses": ["2"]}],
            "responses.jsonl:2: responses: 1 of them, and responses.jsonl:1 has",
        ),
        ([GIVEN[0], GIVEN[0]], "responses.jsonl:2: uid: 'a' is there already"),
        (
            [{**GIVEN[0], "label": [True, True, True]}],
            "responses.jsonl:1: label: is labels meant, a list with true or false",
        ),
        ([{**GIVEN[0], "labels": [True]}], "responses.jsonl:1: labels: 1 for 3 responses"),
        ([{**GIVEN[0], "labels": [1, 0, 0]}], "responses.jsonl:1: labels.0: must be true or false"),
        ([{**GIVEN[0], "uid": "a\ud800"}], "responses.jsonl:1: uid: has half a character"),
        ([{**GIVEN[0], "uid": ""}], "responses.jsonl:1: uid: is empty"),
        ([["a", "34"]], "responses.jsonl:1 must be a JSON object"),
    ],
)
def test_rows_that_are_not_as_they_have_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[object], message: str
) -> None:
    assert cli.main(["eval", "--responses", str(write(tmp_path, *rows)), "--json"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


@pytest.mark.parametrize(
    "arguments", [[], ["config.yaml", "--responses", "x"], ["--responses", "x", "--out", "y"], ["--compare", "a"]]
)
def test_one_thing_at_a_time(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", *arguments])
    assert ended.value.code == 2
