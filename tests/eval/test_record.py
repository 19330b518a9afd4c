from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.eval.record import Graded, Record, Row, Settings, digests, read_rows
from dapo_megatron.types import Prompt

PROMPTS = [Prompt(f"x:{number}", (number,), f"{number}+0=", str(number)) for number in (1, 2, 3)]
SETTINGS = Settings({"model": "a1", "aime.samples": 2}, {"model": "models/a"})


def row(uid: str, sample: int, *, right: tuple[bool, bool] = (True, True)) -> Row:
    grades = {rule: Graded(correct, "3") for rule, correct in zip(("dapo", "lenient"), right, strict=True)}
    return Row(uid, sample, "3", 7, 4, False, grades, "Answer: 3\x1b\ud83d" + "x" * 400, [1, 2, 3])


def both(uid: str) -> list[Row]:
    return [row(uid, 0), row(uid, 1, right=(False, True))]


def open_record(folder: Path, settings: Settings = SETTINGS) -> Record:
    return Record(folder, settings, {"aime": 2})


def test_a_record_goes_on_where_it_was_cut_short_and_ends_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    whole, cut = open_record(tmp_path / "whole"), open_record(tmp_path / "cut")
    for uid in ("x:1", "x:2", "x:3"):
        whole.add("aime", both(uid))
    for uid in ("x:3", "x:1"):
        cut.add("aime", both(uid))
    file = tmp_path / "cut/aime.jsonl"
    written = file.read_bytes()
    for torn in (written[:-1], written + written[: len(written) // 4], written + written[: len(written) // 4 + 99]):
        file.write_bytes(torn)
        again = open_record(tmp_path / "cut", replace(SETTINGS, origin={"model": "moved/a"}))
        missing = [prompt.uid for prompt in again.missing("aime", PROMPTS)]
        assert missing == (["x:1", "x:2"] if torn == written[:-1] else ["x:2"])
        assert again.origin == {"model": "models/a"}
    again.add("aime", both("x:2"))
    assert open_record(tmp_path / "cut").missing("aime", PROMPTS) == []  # nothing is left of what was torn
    for record in (whole, again):
        rows = record.finish("aime", PROMPTS)
        assert [[one.uid for one in of_prompt] for of_prompt in rows] == [[f"x:{n}"] * 2 for n in (1, 2, 3)]
    for name in ("aime.jsonl", "aime.differ.jsonl", "settings.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_rows(file, 2)["x:2"] == both("x:2")
    differing = [json.loads(line) for line in (tmp_path / "cut/aime.differ.jsonl").read_text().splitlines()]
    assert [(one["uid"], one["sample"]) for one in differing] == [("x:1", 1), ("x:2", 1), ("x:3", 1)]
    assert differing[0]["text"] == "x" * 300 and "token_ids" not in differing[0]
    assert "\x1b" not in file.read_text()


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    open_record(tmp_path)
    with pytest.raises(ConfigError, match=r"aime.samples: 2 there, 4 here\n  top_p: nothing there, 0.7 here\nset them"):
        open_record(tmp_path, replace(SETTINGS, decisive={"model": "a1", "aime.samples": 4, "top_p": 0.7}))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{}\n", r"aime.jsonl:1 is no row of an evaluation: uid: field required"),
        ("]\n", r"aime.jsonl:1 is not JSON"),
        (json.dumps({**json.loads('{"uid": "x:1", "sample": 1}')}) + "\n", "aime.jsonl:1 is no row"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    open_record(tmp_path)
    (tmp_path / "aime.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        open_record(tmp_path)


def test_rows_that_are_not_together_are_refused(tmp_path: Path) -> None:
    record = open_record(tmp_path)
    record.add("aime", [row("x:1", 0), row("x:2", 1)])
    with pytest.raises(ConfigError, match=r"aime.jsonl:2: expected sample 1 of 2 of x:1, found sample 1 of x:2"):
        open_record(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="holds no evaluation"):
        open_record(tmp_path)


def test_digests_tell_problems_from_what_the_model_sees_of_them() -> None:
    other_tokens = [replace(prompt, token_ids=(9,)) for prompt in PROMPTS]
    other_answers = [replace(prompt, answer="9") for prompt in PROMPTS]
    here, tokens, answers = map(digests, (PROMPTS, other_tokens, other_answers))
    assert here["problems"] == tokens["problems"] != answers["problems"]
    assert here["prompts"] != tokens["prompts"]
    assert digests(PROMPTS[::-1])["problems"] != here["problems"]
