from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from dapo_megatron.data.stream import PromptStream
from dapo_megatron.errors import DapoError
from dapo_megatron.eval.evaluate import EvalResult, summarise
from dapo_megatron.state import Kept, RunState
from dapo_megatron.types import FinishReason, Group, Prompt, VersionSpan
from tests.helpers.completions import completion

PROMPT = Prompt("a:1", (3, 4), "7+3=\ud83d", "10")
COMPLETIONS = tuple(
    completion([48, 2**31 - 1], logprobs, finish, (VersionSpan(4, 0, 1), VersionSpan(5, 1, 2)))
    for finish, logprobs in ((FinishReason.STOP, [-0.1, -1e-30 / 3]), (FinishReason.LENGTH, [-0.0, -math.inf]))
)
GROUP = Group(PROMPT, COMPLETIONS, ("10", None), (True, False), (1.0, -1.0), timed_out=1)


def parts() -> dict[str, Kept]:
    return {
        "carried": Kept(tuple[Group, ...], ()),
        "evaluations": Kept(dict[str, EvalResult], {}),
    }


def stream() -> PromptStream:
    return PromptStream([PROMPT, Prompt("a:2", (5,), "1+1=", "2"), Prompt("a:3", (6,), "1+2=", "3")], seed=1)


def test_all_parts_stand_where_they_stood_after_a_trip_through_json() -> None:
    before, prompts, skipped = parts(), stream(), Kept(int, 2)
    state = RunState({"prompts": prompts, **before}, skipped=skipped)
    state.steps_done.value = 7
    prompts.take(4)
    before["carried"].value = (GROUP,)
    before["evaluations"].value["before"] = summarise([GROUP], lambda token_ids: "\u7b54\x1b[0m")
    saved = json.loads(json.dumps(state.state_dict()))

    after, others, counted = parts(), stream(), Kept(int, 0)
    restored = RunState({"prompts": others, **after}, skipped=counted)
    restored.load_state_dict(saved)
    assert restored.steps_done.value == 7
    assert others.take(5) == prompts.take(5)
    (group,) = after["carried"].value
    assert replace(group, completions=COMPLETIONS) == GROUP
    assert len(group.completions) == 2
    for read, written in zip(group.completions, COMPLETIONS, strict=True):
        assert read.token_ids.tolist() == written.token_ids.tolist()
        assert read.logprobs.tolist() == written.logprobs.tolist()
        assert (read.finish, read.versions) == (written.finish, written.versions)
    assert repr(after["evaluations"].value) == repr(before["evaluations"].value)  # nan is not equal to itself
    assert counted.value == 2

    counted_elsewhere = Kept(int, 0)
    another_rank = RunState(None, skipped=counted_elsewhere)
    another_rank.load_state_dict(saved)
    assert (another_rank.steps_done.value, counted_elsewhere.value) == (7, 2)


def test_a_state_of_other_parts_is_refused() -> None:
    state = RunState(parts(), skipped=Kept(int, 0)).state_dict()
    with pytest.raises(DapoError, match=r"has skipped, steps_done for shared; this run keeps steps_done"):
        RunState(None).load_state_dict(state)
    with pytest.raises(DapoError, match=r"has nothing for leader; this run keeps carried, evaluations"):
        RunState(parts()).load_state_dict(RunState(None).state_dict())


def test_what_is_kept_of_a_response_is_the_bytes_of_its_arrays() -> None:
    """8 bytes a token, a third more as base64."""
    kept = Kept(tuple[Group, ...], (replace(GROUP, completions=(completion(range(3000)),) * 2),))
    assert len(json.dumps(kept.state_dict())) < 2 * 3000 * 8 * 4 / 3 + 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": "CgAAAA"}, "padding"),
        ({"logprobs": "zczMvQ=="}, r"token_ids \(2,\) and logprobs \(1,\) must be"),
    ],
)
def test_arrays_that_were_changed_are_refused(changes: dict[str, str], message: str) -> None:
    state = Kept(tuple[Group, ...], (GROUP,)).state_dict()
    state["value"][0]["completions"][0] |= changes
    with pytest.raises(ValueError, match=message):
        Kept(tuple[Group, ...], ()).load_state_dict(state)
