import asyncio
from contextlib import closing

from dapo_megatron.config import OverlongConfig, RewardConfig
from dapo_megatron.reward.judge import Judge
from dapo_megatron.types import Completion, FinishReason, Prompt, VersionSpan

PROMPT = Prompt(uid="train.jsonl:12", token_ids=(7, 10, 3, 11), text="30+4=", answer="34")


def completion(text: str, length: int, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion((1,) * length, (-0.1,) * length, finish, text, (VersionSpan(0, 0, length),))


def test_a_group_is_graded_and_shaped_in_order():
    completions = [
        completion("Answer: 34", 4),
        completion("Answer: 35", 4),
        completion("30+", 8, FinishReason.LENGTH),
        completion("Answer: $34$", 6),
        completion("Answer: 34", 8, FinishReason.LENGTH),
    ]
    config = RewardConfig(overlong=OverlongConfig(cache=4), truncated_is_wrong=True)
    with closing(Judge(config, max_response_tokens=8)) as judge:
        group = asyncio.run(judge(PROMPT, completions))
    assert group.prompt is PROMPT
    assert group.completions == tuple(completions)
    assert group.extracted == ("34", "35", None, "34", "34")
    assert group.correct == (True, False, False, True, False)
    assert group.rewards == (1.0, -1.0, -2.0, 0.5, -2.0)
    assert (group.timed_out, group.truncated_right) == (0, 1)


def test_lost_responses_are_wrong_and_counted():
    config = RewardConfig(rule="math_verify", workers=1, timeout_seconds=0.5)
    with closing(Judge(config, max_response_tokens=20480)) as judge:
        texts = ["Answer: $7^{77777777}$", "Answer: 34"]
        group = asyncio.run(judge(PROMPT, [completion(text, 4) for text in texts]))
    assert group.correct == (False, True)
    assert group.rewards == (-1.0, 1.0)
    assert (group.timed_out, group.truncated_right) == (1, 0)
