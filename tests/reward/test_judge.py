import asyncio
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_megatron.config import OverlongConfig, RewardConfig
from dapo_megatron.reward.judge import Judge, text_end
from dapo_megatron.types import Completion, FinishReason, Prompt
from tests.helpers.completions import completion as make
from tests.helpers.completions import read, written

PROMPT = Prompt(uid="train.jsonl:12", token_ids=(7, 10, 3, 11), text="30+4=", answer="34")


TEXTS = ["", "Answer: 34", "Answer: 35", "30+", "Answer: $34$", "Answer: $7^{77777777}$"]


def completion(text: str, length: int, finish: FinishReason = FinishReason.STOP) -> Completion:
    """`length` tokens, of which all but the first, which stands for `text`, are end tokens."""
    return make([TEXTS.index(text), *[0] * (length - 1)], finish=finish)


def decode(token_ids: NDArray[np.int32]) -> str:
    return "".join(TEXTS[token] for token in token_ids)


def test_a_group_is_graded_and_shaped_in_order():
    completions = [
        completion("Answer: 34", 4),
        completion("Answer: 35", 4),
        completion("30+", 8, FinishReason.LENGTH),
        completion("Answer: $34$", 6),
        completion("Answer: 34", 8, FinishReason.LENGTH),
    ]
    config = RewardConfig(overlong=OverlongConfig(cache=4), truncated_is_wrong=True)
    with closing(Judge(config, max_response_tokens=8, decode=decode)) as judge:
        group = asyncio.run(judge(PROMPT, completions))
    assert group.prompt is PROMPT
    assert group.completions == tuple(completions)
    assert group.extracted == ("34", "35", None, "34", "34")
    assert group.correct == (True, False, False, True, False)
    assert group.rewards == (1.0, -1.0, -2.0, 0.5, -2.0)
    assert (group.timed_out, group.truncated_right) == (0, 1)


def test_lost_responses_are_wrong_and_counted():
    config = RewardConfig(rule="math_verify", workers=1, timeout_seconds=0.5)
    with closing(Judge(config, max_response_tokens=20480, decode=decode)) as judge:
        texts = ["Answer: $7^{77777777}$", "Answer: 34"]
        group = asyncio.run(judge(PROMPT, [completion(text, 4) for text in texts]))
    assert group.correct == (False, True)
    assert group.rewards == (-1.0, 1.0)
    assert (group.timed_out, group.truncated_right) == (1, 0)


@pytest.mark.parametrize("format", ["none", "r1"])
def test_only_the_format_reward_reads_how_a_long_response_begins(format):
    """The default rule looks at the end, which is decoded from as far back as it takes."""
    read_from: list[int] = []

    def counting(token_ids: NDArray[np.int32]) -> str:
        read_from.append(len(token_ids))
        return read(token_ids)

    text = "<think>" + "." * 100_000 + "</think><answer>Answer: 34</answer>"
    with closing(Judge(RewardConfig(format=format), max_response_tokens=200_000, decode=counting)) as judge:
        asyncio.run(judge(PROMPT, [written(text)]))
    assert read_from == ([len(text)] if format == "r1" else [4096, 8192, 16384])


def test_the_end_of_a_text_is_that_of_the_whole():
    """Tokens that are no text, in the middle, and a first one that decodes to something else when nothing precedes."""
    tokens = [ord("a") + index % 26 for index in range(5000)]
    tokens[1000:4800] = [0] * 3800

    def beginning_differently(token_ids: NDArray[np.int32]) -> str:
        return "?" + read(token_ids[1:])

    for characters in (10, 100, 300, 1000, 10_000):
        whole = beginning_differently(make(tokens).token_ids)
        assert text_end(make(tokens), beginning_differently, characters)[-characters:] == whole[-characters:]
    assert text_end(make([]), read, 10) == ""


def test_characters_whose_bytes_were_cut_do_not_count():
    """A run of bytes without its beginning is no text at all, as in tokenizers' byte fallback."""

    def bytes_together(token_ids: NDArray[np.int32]) -> str:
        run = bytes(token_ids[token_ids < 256].astype(np.uint8))
        try:
            text = run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(run)
        return text + read(token_ids[token_ids >= 256])

    response = make([*("\u63a8" * 1001).encode(), *map(ord, "\u7b54" * 10)])
    assert text_end(response, bytes_together, 100)[-100:] == bytes_together(response.token_ids)[-100:]
