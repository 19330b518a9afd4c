from __future__ import annotations

from dapo_megatron.prepare.overlap import Overlap, grams, overlaps, words
from dapo_megatron.prepare.rows import Problem

HELD_OUT = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of $s$ kilometers per hour, the walk takes her 4 hours. If the answer is m/n, find m+n."
)
PHRASE = "where $m$ and $n$ are relatively prime positive integers. Find $m+n$."


def problem(text: str, source: str = "train") -> Problem:
    return Problem(f"{source}:1", text, "1", source, "en")


def compare(train: str, held_out: str, n: int = 8) -> list[Overlap]:
    return overlaps([problem(train)], [problem(held_out, "aime")], n, least=0)


def test_words_of_formulas_numbers_and_chinese() -> None:
    assert words("\\frac{12}{x_1} \uff1d \uff21, naïve 已知a=3,求b²") == [
        *("frac", "12", "x", "1", "a", "naïve", "已", "知", "a", "3", "求", "b", "2"),
    ]


def test_grams() -> None:
    assert grams("a b, c: a", 3) == {("a", "b", "c"), ("b", "c", "a")}
    assert grams("A  b?", 3) == {("ab",)}
    assert grams("?!", 3) == set()


def test_a_copy_with_other_signs_is_found() -> None:
    (pair,) = compare(HELD_OUT.upper().replace("$", "").replace(" ", "\n"), HELD_OUT)
    assert pair.share == 1
    assert pair.longest == " ".join(words(HELD_OUT))
    assert pair.of == len(words(HELD_OUT)) - 7


def test_another_question_about_the_same_is_found() -> None:
    rewritten = HELD_OUT.replace("If the answer is m/n, find m+n.", "The answer has the form $k - m$; what is $k + m$?")
    (pair,) = compare(rewritten, HELD_OUT)
    assert 0.5 < pair.share < 1
    assert pair.longest.startswith("every morning aya goes") and pair.longest.endswith("her 4 hours")


def test_a_phrase_of_many_problems_is_little_of_each() -> None:
    (pair,) = compare(f"A fair coin is tossed. The probability that it lands is m/n, {PHRASE}", f"{HELD_OUT} {PHRASE}")
    assert 0 < pair.share < 0.2
    assert pair.longest == "m n where m and n are relatively prime positive integers find m n"


def test_a_short_problem_is_compared_as_a_whole() -> None:
    assert [pair.share for pair in compare("Compute $\\sin 60^\\circ$", "compute sin 60 circ.")] == [1]
    assert compare("Compute $\\sin 60^\\circ + 1$", "compute sin 60 circ.") == []
    assert compare("compute sin 60 circ", HELD_OUT) == []
    assert compare("3-1=", "3+1=") == [] and compare("🍌-🍌=?", "🍎+🍎=?") == [] and compare("?", "!") == []
    assert len(compare("🍎 + 🍎 = ?", "🍎+🍎=")) == 1


def test_chinese_is_compared_by_characters() -> None:
    (pair,) = compare("已知函数 f(x)=x+1;求 f(2) 的值。", "已知函数f(x)=x+1,求f(3)的值", n=4)
    assert (pair.shared, pair.of) == (7, 10)


def test_pairs_come_by_problem_and_the_largest_share_first() -> None:
    train = [problem("one two three four"), problem("five six seven eight")]
    held_out = [
        *(problem("one two three x y z", "a"), problem("one two three four", "b")),
        *(problem("six seven eight", "c"), problem("nine", "d")),
    ]
    found = [(pair.train.text[:3], pair.evaluation.source, pair.share) for pair in overlaps(train, held_out, 3, 0.25)]
    assert found == [("one", "b", 1), ("one", "a", 0.25), ("fiv", "c", 1)]
    assert [pair.share for pair in overlaps(train, held_out, 3, 0.26)] == [1, 1]
