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
        "skipped_in_a_row": Kept(int, 0),
    }


def stream() -> PromptStream:
    return PromptStream([PROMPT, Prompt("a:2", (5,), "1+1=", "2"), Prompt("a:3", (6,), "1+2=", "3")], seed=1)


def test_all_parts_stand_where_they_stood_after_a_trip_through_json() -> None:
    before, prompts = parts(), stream()
    state = RunState(prompts=prompts, **before)
    state.steps_done.value = 7
    prompts.take(4)
    before["carried"].value = (GROUP,)
    before["evaluations"].value["before"] = summarise([GROUP])
    before["skipped_in_a_row"].value = 2

    after, others = parts(), stream()
    restored = RunState(prompts=others, **after)
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert restored.steps_done.value == 7
    assert others.take(5) == prompts.take(5)
    assert after["carried"].value == (GROUP,)
    assert repr(after["evaluations"].value) == repr(before["evaluations"].value)  # nan is not equal to itself
    assert after["skipped_in_a_row"].value == 2


def test_a_state_of_other_parts_is_refused() -> None:
    state = RunState(**parts()).state_dict()
    with pytest.raises(DapoError, match=r"of carried, evaluations, skipped_in_a_row, steps_done; .* keeps steps_done"):
        RunState().load_state_dict(state)
