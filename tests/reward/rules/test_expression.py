from fractions import Fraction

import pytest

from dapo_megatron.reward.rules.expression import NotArithmeticError, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", Fraction(7)),
        ("(1+2)(3)", Fraction(9)),
        ("2^3^2", Fraction(512)),
        ("-2^2", Fraction(-4)),
        ("2^-2", Fraction(1, 4)),
        ("6/3/2", Fraction(1)),
        ("8 - 3 - 2", Fraction(3)),
        ("-(3)-+4", Fraction(-7)),
        (r"\frac{1}{\frac{2}{3}} \cdot 2", Fraction(3)),
        (r"\frac34\div\frac{3}{4}", Fraction(1)),
        (".5", Fraction(1, 2)),
        ("3.4e1", Fraction(34)),
        ("1,234 + 1", Fraction(1235)),
        ("1 234", Fraction(1234)),
        ("(" * 2000 + "1" + ")" * 2000, Fraction(1)),
        ("+".join(["1"] * 2000), Fraction(2000)),
    ],
)
def test_values(text, value):
    assert evaluate(text) == (value, True)


def test_equal_polynomials_have_equal_values():
    square, constant = evaluate("(x+1)^2")
    assert not constant
    assert square == evaluate("x^2 + 2x + 1")[0] != evaluate("x^2 + 2x + 2")[0]


@pytest.mark.parametrize(
    "text",
    [
        *("", "1 +", "* 2", "1 2", "1,23", "(1", "1)", "(1}", "()", "1/0", "0^-1", "2^0.5", "9^9^9", "7" * 600),
        *("xy", "2!", r"2\frac{1}{2}", r"\frac{1}", r"\frac{1}{2", r"\frac{1}{2}{3}"),
    ],
)
def test_refuses(text):
    with pytest.raises(NotArithmeticError):
        evaluate(text)
