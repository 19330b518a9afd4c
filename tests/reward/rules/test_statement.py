import time

import pytest

from dapo_megatron.reward.math import WINDOW
from dapo_megatron.reward.rules.statement import final_answer

IN_A_LINE = [
    *("Answer: {}", "ANSWER : {}", "Ans: {}", "answer is: {}", "Final Answer:\n\n{}", "Answer (in metres): {}"),
    *("So the answer is {}", "The answer, rounded up, is {}", "Hence our answer must be {}", "The answer equals {}"),
    *("**Answer:** {}", "*Answer*: {}", "1. Answer: {}", "<answer>{}", "<answer>\nAnswer: {}", "We add.\n#### {}"),
    *("答案: {}", "答案\uff1a{}", "所以答案是{}", "最终答案为 {}", "答え: {}", "정답: {}", "답은 {}"),
    *(
        "Réponse : {}",
        "La réponse est {}",
        "Die Antwort lautet {}",
        "La respuesta es {}",
        "Ответ: {}",
        "A resposta é {}",
    ),
]
WITH_PARTICLES = [
    *(
        "The answer is, of course, {}",
        "So the answer is clearly {}",
        "La réponse est donc {}",
        "La réponse est donc : {}",
    ),
    *("Die Antwort ist also {}", "Die Antwort lautet somit {}", "La respuesta es, por lo tanto, {}", "所以答案就是{}"),
    *("A resposta é portanto {}", "La risposta è quindi {}", "Het antwoord is dus {}", "The final result is thus {}"),
]
AT_ITS_START = [
    *(
        "## Answer\n{}",
        "### Final Answer\n\n{}",
        "**Answer**\n{}",
        "Answer = {}",
        "Answer - {}",
        "answer {}",
        "【答案】{}",
    ),
]


@pytest.mark.parametrize(
    "announced",
    [
        *IN_A_LINE,
        *WITH_PARTICLES,
        *(f"First 35. {text}" for text in IN_A_LINE),
        *(f"35.\n{text}" for text in AT_ITS_START),
    ],
)
def test_announcements(announced):
    assert final_answer(announced.format("$34$")) == "$34$"
    assert final_answer(announced.format("$34$") + "\n") == "$34$"


@pytest.mark.parametrize(
    ("response", "stated"),
    [
        (r"\boxed{33} Answer: 34", "34"),
        (r"Answer: 33, thus \boxed{34}", r"\boxed{34}"),
        ("The answer is 33. No, the answer is 34", "34"),
        ("Answer: 34\nAn answer is an integer here.", "34"),
        ("Answer: 34\nWe check the answer: it is even.", "34"),
        ("The answer is 34. Is the answer 35? No.", "34. Is the answer 35? No."),
        ("Answer: 34\nIf the answer is 35, we fail.\nThe answer cannot be 36.", "34"),
        ("Answer: 34\nThe previous answer was 33; my first answer is 32.", "34"),
        ("<think>The answer is 33</think>The answer is 34", "34"),
        ("Thus 34 is the final answer.", "Thus 34 "),
        ("Answer:\n\\[\n34\n\\] as said\nand so on", "\\[\n34\n\\] as said"),
        ("The answer is east.", "east."),
        (r"\boxed{\boxed{34}}.", r"\boxed{\boxed{34}}"),
        (r"\boxed{3}$ and $\boxed{4}$", r"\boxed{3}$ and $\boxed{4}"),
        (r"\boxed{3}, wait, \boxed{4}", r"\boxed{4}"),
        (r"\boxed{34} or 35", r"\boxed{34} or 35"),
        ("| Step | Value |\n|---|---|\n| **Final answer** | 34 % |", "34 % "),
        ("| Answer (in km) | $34$ | 2 * 17 |", "$34$ "),
        ("Answer | 34", "34"),
        ("The answer is not 33; the answer is 34", "34"),
    ],
)
def test_the_last_statement_counts(response, stated):
    assert final_answer(response) == stated


@pytest.mark.parametrize(
    "response",
    [
        *(
            "",
            "34",
            "We find 34 and then",
            "The total is 34",
            "Is the answer 34?",
            "If the answer is 34, we are done.",
        ),
        *("The answer isn't 34.", "The answer cannot be 34.", "答案不是34", "Answer:"),
        *("The answer is not (B)", "La respuesta no es 34.", "La réponse n'est pas 34.", "A resposta não é 34."),
        *(
            r"\boxed{34",
            r"Answer: \boxed{34",
            r"\boxed{34}, no, \boxed{35",
            r"Answer: \[ 34",
            r"Answer: \(34",
            "Answer: $$34",
        ),
        "<think>The answer is 34</think>I do not know.",
    ],
)
def test_no_statement_or_one_cut_off(response):
    assert final_answer(response) is None


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "answer",
            "answer ",
            "answer: ",
            "answer \n",
            "the answer is 34. ",
            "is the answer ",
            "is therefore ",
            "答案",
        ),
        *("####\n", "\n", " ", "*", "{", "}", r"\boxed{", r"\boxed{1} or ", "$$", r"\[", "not ", "\ufdfa", "<answer>"),
        *("is, ", "is so ", "| ", "**a", "```", "$$ ", "Result\n", "so, ", "a. "),
    ],
)
def test_takes_linear_time(piece):
    """Four times what is ever read takes seconds at the most; the square of it would take minutes."""
    text = "answer " + piece * (4 * WINDOW // len(piece))
    started = time.process_time()
    for whole in (text, text + ": 34", text + "\nno", "####" + text + "\nno", text[7:] + " so it is 34."):
        final_answer(whole)
    assert time.process_time() - started < 4.0
