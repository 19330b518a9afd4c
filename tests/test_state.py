from __future__ import annotations

import json

import pytest

from dapo_megatron.data.stream import PromptStream
from dapo_megatron.errors import DapoError
from dapo_megatron.eval.evaluate import EvalResult, summarise
from dapo_megatron.state import Kept, RunState
from dapo_megatron.types import Completion, FinishReason, Group, Prompt, VersionSpan

PROMPT = Prompt("a:1", (3, 4), "7+3=\ud83d", "10")
COMPLETIONS = tuple(
    Completion((10, 2), (-0.1, -1e-30 / 3), finish, text, (VersionSpan(4, 0, 1), VersionSpan(5, 1, 2)))
    for finish, text in ((FinishReason.STOP, "10"), (FinishReason.LENGTH, "\u7b54\x1b[0m"))
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
    before["evaluations"].value["before"] = summarise([GROUP])
    saved = json.loads(json.dumps(state.state_dict()))

    after, others, counted = parts(), stream(), Kept(int, 0)
    restored = RunState({"prompts": others, **after}, skipped=counted)
    restored.load_state_dict(saved)
    assert restored.steps_done.value == 7
    assert others.take(5) == prompts.take(5)
    assert after["carried"].value == (GROUP,)
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
