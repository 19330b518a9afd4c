import asyncio
import json
import time
from pathlib import Path

import pytest

from dapo_megatron.reward.math import WINDOW, grade
from dapo_megatron.reward.pool import GradingPool

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [json.loads(line) for line in (GOLDEN / "reward_cases.jsonl").read_text().splitlines()]

# Right, but longer than what is evaluated (math_verify.MAX_CHARACTERS); nobody states an answer so.
TOO_LONG = {"long sum of ones"}


def test_agrees_with_common_sense():
    with GradingPool("lenient", workers=2, timeout_seconds=2.0) as pool:
        grades = asyncio.run(pool.grade([(case["response"], case["gold"]) for case in CASES]))
    different = {
        case["note"] for case, got in zip(CASES, grades, strict=True) if got.correct != case["expected_by_common_sense"]
    }
    assert different == TOO_LONG


# Class -> (what is stated, the gold answer).
FORGIVEN = {
    "delimiters and fonts": [
        *(
            (text, "34")
            for text in ("34.", "`34`", "$34.$", r"\[ 34 \]", "**34**", r"\mathbf{34}", r"\(34\)", "\uff13\uff14")
        ),
        (r"\boxed{34^\circ}", "34"),
        (r"\boxed{34^{\circ}}", "34"),
        (r"\boxed{\dfrac{68}{2}}", "34"),
        (r"\left[0, \frac12\right]", "[0,0.5]"),
    ],
    "numbers": [
        *(
            (text, "1234567")
            for text in ("1,234,567.0", "1 234 567", r"1{,}234{,}567", r"1\,234\,567", "01234567", "+1234567")
        ),
        *((text, "2.5") for text in ("2 1/2", r"2\frac{1}{2}", "2\u00bd", "5/2", "25e-1", "10/4", "-(-2.5)")),
    ],
    "units and currency": [
        *(
            (f"34{unit}", "34")
            for unit in (" cm^2", "cm", " m", r"\text{ m}", r"\,\mathrm{km/h}", " m/s", "%", r"^\circ", "\u00b0C")
        ),
        *((f"34 {unit}", "34") for unit in ("apples", "square units", "dollars per day", "percent", r"\text{ apples}")),
        *(
            (f"34 {unit}", r"34\text{ units}")
            for unit in ("sq ft", "sq. in.", "cu ft", "in.", "mph", "Hz", "kW", "yrs")
        ),
        *((text, r"34\text{ in}^2") for text in ("34", "34 in^2", "34 square inches", "34 in\u00b2")),
        *((text, r"34\%") for text in ("34 percent", "34%", "034", "34.00")),
        *((text, "1250") for text in ("$1,250.00", "1250.00 USD", r"\$1{,}250")),
        *((text, "34") for text in ("$34", r"\$34", "\u20ac34", "USD 34", "34\u5143", "34 \u4e2a\u82f9\u679c")),
    ],
    "remarks": [
        *(
            (f"34{remark}", "34")
            for remark in (" (since 17*2)", " since $17*2 = 34$", ", because 2 and 17 are primes", " (17*2)")
        ),
        *(
            (f"34{remark}", "34")
            for remark in (", as required.", "; see above", " \u2014 17 doubled", " - the sum", ", not 35", " \u2713")
        ),
        *(
            (f"34{remark}", "34")
            for remark in (". Check: 17*2 = 34.", " is the least such number", " out of 50", "<|im_end|>")
        ),
        ("x = 34, where x is the total", "34"),
        ("1/2, i.e. 0.5", "0.5"),
    ],
    "sentences": [
        ("There are 34 apples.", "34"),
        ("With 2 boxes, the total is 34.", "34"),
        ("She needs exactly $34$ more", "34"),
        ("\u5c0f\u660e\u670934\u4e2a\u82f9\u679c\u3002", "34"),
        ("The solutions are 1 and 2.", "1,2"),
    ],
    "equations": [
        (r"34 = 2 \cdot 17", "34"),
        ("k + m = 11 + 23 = 34", "34"),
        (r"\sqrt{2} \approx 1.414", r"\sqrt{2}"),
        ("y = 2x + 1", "2x+1"),
        ("2x+1", "y = 2x+1"),
        ("x + y = 1", "y = 1 - x"),
    ],
    "collections": [
        ("(1, 2)", "(1,2)"),
        ("(100,200)", "(100, 200)"),
        ("2 and 1", "1, 2"),
        ("1, 2, and 3", "3,2,1"),
        ("x = 1 or x = 2", "1,2"),
        ("{2, 1}", r"\{1,2\}"),
        (r"\{2, 1\}", "1, 2"),
        (r"\pm 3", "3,-3"),
        ("x = 4, x = 1 and x = -2", r"\{-2, 1, 4\}"),
        ("x_1 = 4, x_{2} = 1", "1, 4"),
        ("1/2 or 0.5", "0.5"),
        (r"\boxed{1} and \boxed{2}", "2,1"),
    ],
    "intervals": [
        (r"3 \le x < 4", "[3,4)"),
        ("x \u2208 [3, 4)", "[3,4)"),
        ("x > 3", r"(3,\infty)"),
        (r"(2,\infty) \cup (-\infty,1)", r"(-\infty,1)\cup(2,\infty)"),
        (r"(0.5, \sqrt{12})", r"(\frac12, 2\sqrt3)"),
    ],
    "symbols": [
        *(
            (text, r"2\sqrt{3}")
            for text in (r"\sqrt{12}", r"2\sqrt 3", "2\u221a3", "sqrt(12)", "2sqrt3", r"\frac{6}{\sqrt{3}}")
        ),
        ("3\u03c0/4", r"\frac{3\pi}{4}"),
        ("2**10", "1024"),
        ("-2^2", "-4"),
        ("5!", "120"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("3+2i", "2i+3"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
    "words and choices": [
        *((text, "B") for text in ("(B)", "B.", r"\text{(B)}", "(B) 34", "B because it is larger")),
        ("(B) 34", "34"),
        ("It is an ellipse, since e < 1", r"\text{Ellipse}"),
        ("4:30 pm", r"\text{4:30 p.m.}"),
        ("no", r"\text{No}"),
    ],
}
REFUSED = {
    "near values and signs": [
        *(
            (text, "34")
            for text in (
                "33.9999999",
                "34.0001",
                "-34",
                "340",
                "3.4",
                "1/34",
                "34!",
                "34x",
                "34\u03c0",
                r"\frac{34}{35}",
            )
        ),
        ("1.414214", r"\sqrt{2}"),
        ("0.333333", "1/3"),
        ("22/7", r"\pi"),
        ("3-2i", "3+2i"),
        (r"\sqrt{12}", r"3\sqrt{2}"),
        ("x < 3", r"x \le 3"),
    ],
    "hedges": [
        *(
            (text, "34")
            for text in ("34 or 35", "35 or 34", "34 (or 35)", "34 apples or 35", "34, or maybe 35", "either 34 or 35")
        ),
        *(
            (text, "34")
            for text in (
                "34 or thirty-five",
                "$$34$$ or $$35$$",
                "34 oder 35",
                "34\u621635",
                "33, 34",
                "34 to 36",
                "34?",
            )
        ),
        *(
            (text, "34")
            for text in (r"\boxed{34} or \boxed{35}", r"\boxed{34} or 35", "The values 33, 34, 35 are possible.")
        ),
        ("x = 3, y = 4", "4"),
        ("B or C", "B"),
        ("even or odd", r"\text{even}"),
    ],
    "taken back": [
        *(
            (text, "34")
            for text in ("34. Wait, that is wrong; 35.", "34. Actually, 35", "34 is not right", "not 34", "it isn't 34")
        ),
        ("not Monday", "Monday"),
    ],
    "bounds": [
        (text, "34") for text in ("at least 34", "less than 34", "34 at most", "x > 34", "twice 34", "a multiple of 34")
    ],
    "changed by words": [
        *(
            (f"34 {word}", "34")
            for word in ("million", "thousand", "dozen", "squared", "minus 1", "apples and 12 pears", "\u4e07")
        ),
        ("5 hours 30 minutes", "5"),
        ("4:30", "4"),
        ("4:30 a.m.", r"\text{4:30 p.m.}"),
        ("June 20", "July 20"),
        ("20", r"\text{June 20}"),
    ],
    "equations": [
        ("35 = 34", "34"),
        ("y = 3", "x = 3"),
        ("x + y = 2", "x + y = 1"),
        ("1", "x^2 + y^2 = 1"),
    ],
    "collections": [
        ("(2,1)", "(1,2)"),
        ("[1,2]", "(1,2)"),
        ("(1,2)", r"\{1,2\}"),
        ("1, 2", "1"),
        ("1, 2, 2", "1, 2"),
        ("x = 1, y = 2", "1, 2"),
        ("x_1 = 1, y_1 = 2", "1, 2"),
        ("x = 1, x = 2", "(1, 2)"),
        ("(1, 2", "(1,2)"),
    ],
    "not the same text": [
        ("x", "y"),
        ("east", "seat"),
        ("uneven", r"\text{even}"),
        ("40_9", "40_8"),
        ("1,23", "123"),
        ("3 4", "34"),
    ],
    "no values": [
        (text, "34") for text in ("1/0", "1e999", "((((", "}}}}", "", "$", "none", r"\frac{1}{2", "=", "34 = ")
    ],
}


@pytest.mark.parametrize(
    ("answer", "gold"),
    [pytest.param(*case, id=f"{name}: {case[0]}") for name, cases in FORGIVEN.items() for case in cases],
)
def test_forgives_notation(answer, gold):
    assert grade(f"Answer: {answer}", gold, "lenient").correct


@pytest.mark.parametrize(
    ("answer", "gold"),
    [pytest.param(*case, id=f"{name}: {case[0]}") for name, cases in REFUSED.items() for case in cases],
)
def test_does_not_forgive(answer, gold):
    assert not grade(f"Answer: {answer}", gold, "lenient").correct


# Responses that announce no answer: their last sentence may, where it concludes.
CONCLUDED = {
    "what is left": [
        *(
            (text, "C")
            for text in (
                "The answer is not (B), because 4 is even; that leaves (C).",
                "The answer is not (B). So it must be (C).",
                "It cannot be (A) or (B), so it must be (C).",
                "(A) and (B) are even. This leaves us with only (C).",
            )
        ),
        ("The answer isn't 35, which leaves 34.", "34"),
    ],
    "labels": [
        *((f"17 * 2\n{label}: 34", "34") for label in ("Result", "Solution", "**Total**", "Conclusion", "### Result")),
        *((f"17 * 2\n{label}: 34", "34") for label in ("Ergebnis", "Résultat ", "Resultado", "Итого", "结果", "결과")),
        *((f"17 * 2\n{label}\n\n$34$", "34") for label in ("## Result", "**Solution**", "**Conclusion:**")),
        ("Solutions: x = 1, x = 2", "2, 1"),
        ("Solution set: {1, 2}", r"\{2, 1\}"),
        ("Lösungsmenge: {1; 2}", "1, 2"),
        ("Conclusion: The total is 34.", "34"),
        ("| Item | Price |\n|---|---|\n| Total | $34.00 |", "34"),
        ("Final result: 34\n\nWe add 17 and 17.", "34"),
    ],
    "roots": [
        ("The solutions are $x = 4$, $x = 1$, and $x = -2$.", r"\{-2,1,4\}"),
        ("So the roots are x_1 = 4 and x_2 = 1.", "1,4"),
        ("The solutions are 4 and 1.\n\nWe can verify each by substitution.", "1 and 4"),
    ],
    "bold": [
        ("17 * 2\n\n**$1,250.00**", "1250"),
        ("It falls on a **Tuesday**.", r"\text{Tuesday}"),
        ("Therefore she pays **$34** for the tickets.", "34"),
    ],
    "sentences": [
        *((f"17 * 2. {text}", "34") for text in ("Hence x = 34.", "So the length is 34 in.", "It comes to 34.")),
        *((f"17 * 2. {text}", "34") for text in ("So Tom has a total of 17 + 17 = 34 pens.", "Le total est donc 34.")),
        *((f"We get\n{text}", "34") for text in ("$$\nx = 34\n$$", "\\[\n34\n\\]", "```\n34\n```")),
        ("So it is 34.\n\nI hope this helps! Let me know if you have 3 questions.", "34"),
        ("So the day is Tuesday.", r"\text{Tuesday}"),
    ],
}
NOT_CONCLUDED = {
    "what is left": [
        ("The answer is not (B), because 4 is even.", "B"),
        ("The answer is not (B); that leaves (C) or (D).", "C"),
        ("If the answer is not 35, that leaves 34.", "34"),
    ],
    "labels": [
        *((f"Result: {text}", "34") for text in ("2x + 1 = 34, so x = 3", "34 or 35", "not 34", "34 +", "2x = 34")),
        ("Total: 34\n\nBut 2 are returned, so it is 32.", "34"),
        ("| x | Result |\n|---|---|\n| 34 | 35 |", "34"),
        ("Solution: We have 34", "34"),
    ],
    "roots": [
        ("The solutions are x = 4 and x = 1.", "4"),
        ("The solutions are x = 4 and x = 1.", "(4,1)"),
        ("So x_1 = 4 and y_1 = 1.", "4,1"),
    ],
    "bold": [
        *(
            (f"{text}", "3")
            for text in ("**Step 3**", "**3. Find the area**", "**Divide by 3:**", "So it is **3** or 4.")
        ),
        ("It takes **3 hours** and **20 minutes**.", "3"),
        ("It is not **3**.", "3"),
    ],
    "cut off": [
        *(
            (text, "34")
            for text in ("So it is 34", "So it is 34...", "Thus $$x = 34", "So it is 34. Next, we", "So x = 34,")
        ),
        *(
            (text, "34")
            for text in (r"So it is 34. Thus \boxed{", "We find 34. Is it 34?", "Thus\n\\[ x = 17 + 17 \\]")
        ),
    ],
    "steps": [
        *((text, "34") for text in ("We solve 2x + 1 = 34.", "Hence 2x + 1 = 34.", "Let x be 34.", "Step 34.")),
        *((text, "34") for text in ("Next, we divide by 34.", "We check: 17 + 17 = 34.", "If x is 3, y is 34.")),
        *((text, "34") for text in ("So half of it is 34.", "The first number is 34.", r"So \(\frac{x}{2} = 34\).")),
    ],
    "hedges": [
        *(
            (text, "34")
            for text in ("So it is 34 or 35.", "So it is less than 34.", "Hence x > 34.", "So it is not 34.")
        ),
        *(
            (text, "34")
            for text in ("So 34 boys have 12 pens.", "So there are 34 boys and 12 girls.", "Es ist nicht 34.")
        ),
        *((text, "34") for text in ("Also ist x kleiner als 34.", "So x is 34. Wait, that is wrong.")),
    ],
}


@pytest.mark.parametrize(
    ("response", "gold"),
    [pytest.param(*case, id=f"{name}: {case[0]}") for name, cases in CONCLUDED.items() for case in cases],
)
def test_a_conclusion_counts_as_a_last_resort(response, gold):
    assert grade(response, gold, "lenient").correct
    assert not grade(f"{response}\nAnswer: 99", gold, "lenient").correct


@pytest.mark.parametrize(
    ("response", "gold"),
    [pytest.param(*case, id=f"{name}: {case[0]}") for name, cases in NOT_CONCLUDED.items() for case in cases],
)
def test_no_step_counts_as_a_conclusion(response, gold):
    assert not grade(response, gold, "lenient").correct


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("<think>34?</think><answer>35</answer>", "35"),
        ("<answer>\nAnswer: $35$\n</answer>", "35"),
        (r"\boxed{34}, or rather \boxed{\frac{70}{2}}", "35"),
        ("Answer: 34.50 dollars, since 69/2", "69/2"),
        (r"Answer: $2\sqrt{3}$ cm", r"2\sqrt{3}"),
        ("Answer: east", "east"),
        ("Answer: 34 or 35", "34 or 35"),
        (r"\boxed{34", None),
        ("I think it is 34", None),
    ],
)
def test_what_counts_as_the_answer(response, extracted):
    assert grade(response, "1", "lenient").extracted == extracted


@pytest.mark.parametrize("gold", ["34", "(1,2)", "x^2+1", r"\text{even}"])
@pytest.mark.parametrize(
    "piece",
    [
        *(
            "answer ",
            "answer: ",
            "a ",
            "aa ",
            "{",
            r"\boxed{",
            r"\text{",
            "(",
            "1 ",
            "1,234",
            "9^",
            "-",
            "=",
            "*",
            "9",
            "a'b ",
        ),
        *(
            "1,",
            "1 or ",
            "x=",
            r"\approx",
            "+",
            ". ",
            "is ",
            "is therefore ",
            "\u00bd",
            "1/",
            "~",
            "A) ",
            "[1,2)",
            r"\{",
            "wait ",
        ),
    ],
)
def test_takes_bounded_time_on_anything(piece, gold):
    started = time.process_time()
    many = piece * (WINDOW // len(piece) - 10)
    for text in (
        piece * 100_000,
        f"Answer: {many}",
        f"Answer: the {many} 34",
        f"Answer: {piece * 500}!",
        rf"\boxed{{{many}}}",
    ):
        grade(text, gold, "lenient")
    assert time.process_time() - started < 1.0
