from __future__ import annotations

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.prepare.filters import distinct, only_languages, without_images
from dapo_megatron.prepare.rows import Problem


def problem(row: int, text: str, answer: str = "1", language: str = "en", has_image: bool = False) -> Problem:
    return Problem(f"a.parquet:{row}", text, answer, "a", language, has_image)


def test_of_a_hundred_copies_the_first_stays() -> None:
    texts = ["q", "q\n", "Q"]
    rows = (problem(1 + copy * 3 + index, text) for copy in range(100) for index, text in enumerate(texts))
    filtered = distinct(rows)
    assert filtered.rows == 300
    assert [(p.uid, p.text) for p in filtered.problems] == [
        (f"a.parquet:{1 + n}", text) for n, text in enumerate(texts)
    ]
    assert [(step["filter"], step["removed"], step["left"]) for step in filtered.steps] == [
        *(("repeats", 297, 3), ("contradictory", 0, 3)),
    ]


def test_all_copies_of_a_problem_with_different_answers_go() -> None:
    rows = [problem(1, "q", "1"), problem(2, "r"), problem(3, "q", "2"), problem(4, "q", "1"), problem(5, "q", "3")]
    filtered = distinct(rows)
    assert [p.text for p in filtered.problems] == ["r"]
    (removed,) = filtered.removed
    assert removed["answers"] == {"1": "a.parquet:1", "2": "a.parquet:3", "3": "a.parquet:5"}
    assert (removed["filter"], removed["uid"], removed["prompt"]) == ("contradictory", "a.parquet:1", "q")
    assert filtered.steps[1] == {**filtered.steps[1], "removed": 1, "left": 1}


def test_images_and_languages_are_left_out_with_an_account() -> None:
    rows = [
        problem(1, "a", has_image=True),
        problem(2, "b", language="zh"),
        problem(3, "c"),
        problem(4, "d", language="de"),
    ]
    filtered = distinct(rows)
    without_images(filtered)
    only_languages(filtered, ["zh", "de"])
    assert [p.uid for p in filtered.problems] == ["a.parquet:2", "a.parquet:4"]
    assert [(row["filter"], row["uid"]) for row in filtered.removed] == [
        ("images", "a.parquet:1"),
        ("languages", "a.parquet:3"),
    ]
    assert filtered.removed[1]["language"] == "en"


def test_a_language_that_does_not_occur_is_refused_with_those_that_do() -> None:
    filtered = distinct([problem(1, "a"), problem(2, "b", language="zh"), problem(3, "c")])
    with pytest.raises(ConfigError, match="no problem is fr; there are en 2, zh 1"):
        only_languages(filtered, ["zh", "fr"])


def test_a_filter_that_leaves_nothing_says_so() -> None:
    with pytest.raises(ConfigError, match=r"the filter images \(an image, or a link\) leaves none of 1 problems"):
        without_images(distinct([problem(1, "a", has_image=True)]))
    with pytest.raises(ConfigError, match=r"the filter contradictory .* leaves none of 1 problems"):
        distinct([problem(1, "a", "1"), problem(2, "a", "2")])
