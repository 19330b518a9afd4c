import time

import pytest

from dapo_megatron.reward.format import keeps_r1_format


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("\n <think>a\nb</think>\n\n<answer>34</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<think>a</think>so<answer>b</answer>", False),
        ("well <think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>.", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("</think><think><answer>b</answer>", False),
        ("<Think>a</Think><answer>b</answer>", False),
        ("34", False),
        ("", False),
    ],
)
def test_r1_format(response, kept):
    assert keeps_r1_format(response) is kept


@pytest.mark.parametrize("piece", ["<think>", "<", "</think><answer>", " ", "<think></think><answer></answer>"])
def test_a_megabyte_takes_bounded_time(piece):
    noise = piece * (1_000_000 // len(piece))
    started = time.process_time()
    keeps_r1_format(noise)
    keeps_r1_format(f"<think>{noise}</think>{noise}<answer>{noise}</answer>{noise}")
    assert time.process_time() - started < 0.5
