import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.stream import PromptStream
from dapo_megatron.errors import ConfigError
from dapo_megatron.types import Prompt

PROMPTS = [Prompt(f"a:{number}", (number,), "", "1") for number in range(10)]


def uids(prompts):
    return [prompt.uid for prompt in prompts]


@given(st.lists(st.integers(0, 25), max_size=12), st.integers(0, 5))
@settings(deadline=None)
def test_every_prompt_once_per_epoch_however_it_is_drawn(counts, seed):
    stream = PromptStream(PROMPTS, seed)
    drawn = [prompt for count in counts for prompt in stream.take(count)]
    assert len(drawn) == sum(counts)
    assert drawn == PromptStream(PROMPTS, seed).take(sum(counts))
    for start in range(0, len(drawn), len(PROMPTS)):
        epoch = uids(drawn[start : start + len(PROMPTS)])
        assert len(set(epoch)) == len(epoch)


def test_epochs_and_seeds_have_orders_of_their_own():
    stream = PromptStream(PROMPTS, 0)
    first, second, other = stream.take(10), stream.take(10), PromptStream(PROMPTS, 1).take(10)
    assert sorted(uids(first)) == sorted(uids(second)) == sorted(uids(PROMPTS))
    assert len({tuple(uids(order)) for order in (PROMPTS, first, second, other)}) == 4


@given(st.integers(0, 35), st.integers(0, 25))
@settings(deadline=None)
def test_a_restored_stream_goes_on_where_it_stood(before, after):
    stream = PromptStream(PROMPTS, 3)
    stream.take(before)
    state = json.loads(json.dumps(stream.state_dict()))
    other = PromptStream(PROMPTS, 3)
    other.take(7)
    other.load_state_dict(state)
    assert other.take(after) == stream.take(after)


def test_cursor_of_another_stream_is_refused():
    state = PromptStream(PROMPTS, 3).state_dict()
    with pytest.raises(ConfigError, match=r"train\.seed 3, and here it is 4"):
        PromptStream(PROMPTS, 4).load_state_dict(state)
    with pytest.raises(ConfigError, match="had 10 prompts, and here are 9"):
        PromptStream(PROMPTS[:9], 3).load_state_dict(state)
    with pytest.raises(ConfigError, match="other file names, tokens or answers"):
        PromptStream(PROMPTS[::-1], 3).load_state_dict(state)


@pytest.mark.parametrize("change", [{"uid": "b:4"}, {"token_ids": (5,)}, {"token_ids": (4, 4)}, {"answer": "2"}])
def test_a_prompt_that_has_changed_is_refused(change):
    state = PromptStream(PROMPTS, 3).state_dict()
    PromptStream([replace(prompt) for prompt in PROMPTS], 3).load_state_dict(state)
    others = [replace(prompt, **change) if prompt.uid == "a:4" else prompt for prompt in PROMPTS]
    with pytest.raises(ConfigError, match="other file names, tokens or answers"):
        PromptStream(others, 3).load_state_dict(state)


def test_tokens_that_move_to_the_next_prompt_are_seen():
    pairs = [
        [Prompt("a:1", one, "", "1"), Prompt("a:2", two, "", "1")] for one, two in (((1, 2), (3,)), ((1,), (2, 3)))
    ]
    first, second = (PromptStream(prompts, 0).state_dict()["digest"] for prompts in pairs)
    assert first != second


def test_no_prompts():
    with pytest.raises(ConfigError, match="no prompts"):
        PromptStream([], 0)
