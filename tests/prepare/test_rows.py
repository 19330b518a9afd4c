from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.prepare.rows import Fields, Problem, problems_of
from dapo_megatron.prepare.sets import SETS, TEMPLATE, WRAPPERS
from dapo_megatron.prepare.sources import Source


def read(folder: Path, *rows: dict[str, Any], name: str = "own", **fields: str) -> list[Problem]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(problems_of(Source(name, (path,), SETS.get(name)), Fields(**fields)))


def published(problem: str, answer: str = "1", wrapper: str = TEMPLATE) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": wrapper.replace("{problem}", problem)}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("problem", ["1+1?", "  a\n\n b\t\n", "求 $x^2$\n的值。", "{problem}", 'after "Answer:".'])
def test_the_text_around_a_problem_is_taken_off_and_nothing_else(tmp_path: Path, wrapper: str, problem: str) -> None:
    (found,) = read(tmp_path, published(problem, " 34 ", wrapper), name="dapo-math-17k")
    assert (found.text, found.answer, found.uid) == (problem, "34", "dapo-math-17k.jsonl:1")


def test_the_layout_of_the_published_parquet(tmp_path: Path) -> None:
    path = tmp_path / "dapo-math-17k.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([published("1+1", "2"), published("2+2", "4")]), path)
    found = list(problems_of(Source("dapo-math-17k", (path,), SETS["dapo-math-17k"]), Fields()))
    assert found[1] == Problem("dapo-math-17k.parquet:2", "2+2", "4", "dapo-math-17k", "en")


def test_another_text_around_a_published_problem_is_refused(tmp_path: Path) -> None:
    row = published("1+1", wrapper="Solve this: {problem}")
    with pytest.raises(ConfigError, match=r"dapo-math-17k.jsonl:1: the text in prompt does not begin and end as that"):
        read(tmp_path, row, name="dapo-math-17k")
    assert read(tmp_path, row)[0].text == "Solve this: 1+1"


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("own", 34, "34"),
        ("own", "34", "34"),
        ("own", " 34\n", "34"),
        ("own", "1,234", "1,234"),
        ("own", 10**30, "1" + "0" * 30),
        ("own", r"\frac{1}{2}", r"\frac{1}{2}"),
        ("amc-2023", 27.0, "27"),
        ("amc-2023", "27.0", "27"),
        ("aime-2025", "070", "070"),
        ("gsm8k-test", "She has 9 * 2 = $<<9*2=18>>18.\n#### 1,018", "1018"),
        ("gsm8k-test", "1,000", "1000"),
        ("gsm8k-test", "-3", "-3"),
    ],
)
def test_answers(tmp_path: Path, name: str, answer: Any, expected: str) -> None:
    assert read(tmp_path, {"problem": "p", "answer": answer}, name=name)[0].answer == expected


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("own", None, r"must be text or an integer; got None \(NoneType\)"),
        ("own", " ", "is empty$"),
        ("own", True, r"got True \(bool\)"),
        ("own", ["3"], r"got \['3'\] \(list\)"),
        ("own", 34.0, 'write 34.0 as 34 or "34.0"'),
        ("amc-2023", 27.5, r"got 27.5 \(float\)"),
        ("amc-2023", "27.5", "must be an integer; got '27.5'"),
        ("gsm8k-train", "9 * 2 = 18, so the answer is eighteen", "must end with #### and a number"),
        ("gsm8k-train", "9 * 2 = 18\n#### ", "must end with #### and a number"),
    ],
)
def test_what_is_no_answer_is_refused_by_row_and_field(tmp_path: Path, name: str, answer: Any, said: str) -> None:
    good = {"problem": "p", "answer": "#### 3" if "gsm8k" in name else "3"}
    with pytest.raises(ConfigError, match=rf"^{name}.jsonl:2: the answer in answer .*{said}"):
        read(tmp_path, good, {"problem": "q", "answer": answer}, name=name)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"text": "p", "answer": "1"}],
            "own.jsonl:1: no field with the problem: looked for prompt, pro",
        ),
        (
            [{"problem": "p", "gold": "1"}],
            r"own.jsonl:1: no field with the answer: .*the row has problem, gold;",
        ),
        ([{"problem": "p", "answer": "1"}, {"prompt": "q", "answer": "1"}], "own.jsonl:2: no field 'problem'"),
        (
            [{"prompt": "p", "reward_model": {"ground_truth": "1"}}, {"prompt": "p", "reward_model": "1"}],
            "own.jsonl:2: no field 'reward_model.ground_truth': where 'ground_truth' should be, the row is str",
        ),
        ([{"problem": None, "answer": "1"}], "own.jsonl:1: the problem in problem must be text"),
        ([{"problem": " \n", "answer": "1"}], "own.jsonl:1: the problem in problem is empty"),
        ([{"problem": "x\ud800", "answer": "1"}], "own.jsonl:1: the problem in problem has half a character"),
        ([{"problem": "x", "answer": "1\ud800"}], "own.jsonl:1: the answer in answer has half a character"),
        ([{"problem": "x", "answer": "1", "lang": "\ud800"}], "own.jsonl:1: lang has half a character"),
        ([{"prompt": [{"role": "system", "content": "s"}], "answer": "1"}], "without a chat message of role 'user'"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, *rows)


def test_fields_of_somebodys_own_data(tmp_path: Path) -> None:
    row = {"problem": "the wrong one", "in": {"q": "p"}, "answer": "the wrong one", "gold": 3}
    (found,) = read(tmp_path, row, prompt="in.q", answer="gold")
    assert (found.text, found.answer) == ("p", "3")
    with pytest.raises(ConfigError, match=r"own.jsonl:1: no field 'in.z': where 'z' should be, the row has q"):
        read(tmp_path, row, prompt="in.z")


@pytest.mark.parametrize(
    ("text", "said", "language"),
    [
        ("What is $\\alpha$?", {}, "en"),
        ("Was ist 1+1?", {}, "en"),
        ("Was ist 1+1?", {"language": "DE"}, "de"),
        ("求 x", {}, "zh"),
        ("求 x", {"lang": "zh"}, "zh"),
        ("x を求めよ", {}, "ja"),
        ("값은?", {}, "ko"),
        ("Найдите x", {}, "ru"),
        ("Was ist 1+1?", {"language": None}, "en"),
    ],
)
def test_languages(tmp_path: Path, text: str, said: dict[str, Any], language: str) -> None:
    assert read(tmp_path, {"problem": text, "answer": "1", **said})[0].language == language


@pytest.mark.parametrize(
    ("row", "has_image"),
    [
        ({"problem": "In ![](https://cdn.mathpix.com/a?x=1), find x"}, True),
        ({"problem": "In ![figure](a), find x"}, True),
        ({"problem": "For the picture see http://a.org/b"}, True),
        ({"problem": "See <image>"}, True),
        ({"problem": r"See \includegraphics{a}"}, True),
        ({"problem": "p", "images": [{"bytes": "x"}]}, True),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "a"}]}]}, True),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "p"}]}]}, True),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}]}, False),
        ({"problem": "p", "images": [], "image": None}, False),
        ({"problem": "[asy] draw(A--B); [/asy] What is $5![x]$?"}, False),
        ({"problem": "The picture is not a.png"}, False),
    ],
)
def test_images(tmp_path: Path, row: dict[str, Any], has_image: bool) -> None:
    assert read(tmp_path, {**row, "answer": "1"})[0].has_image is has_image
