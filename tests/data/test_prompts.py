import json
from typing import Any

import pytest

from dapo_megatron.config import DataConfig
from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.errors import ConfigError


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*rows, **keys):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_prompts(DataConfig(train="unused.jsonl", **keys), tokenizer, str(path))

    return load


def row(prompt: Any = "1+2=", answer: Any = "3"):
    return {"prompt": prompt, "answer": answer}


def test_plain_prompt_gets_the_tokenizers_special_tokens(load, tokenizer):
    first, second = load(row(), row("4+4=", "8"))
    assert (first.uid, first.text, first.answer) == ("train.jsonl:1", "1+2=", "3")
    assert first.token_ids == tuple(tokenizer.convert_tokens_to_ids(["<begin>", *"1+2="]))
    assert (second.uid, second.answer) == ("train.jsonl:2", "8")


def test_template_leaves_other_braces_alone(load):
    (prompt,) = load(row("{x}"), template="solve {problem} {y}")
    assert prompt.text == "solve {x} {y}"


def test_chat_template_does_not_double_special_tokens(load, tokenizer):
    (prompt,) = load(row(), chat_template=True, template="q {problem}")
    assert prompt.text == "<user>q 1+2=<reply>"
    assert prompt.token_ids == tuple(tokenizer.convert_tokens_to_ids(["<user>", *"q 1+2=", "<reply>"]))


def test_tokenizer_without_chat_template(load, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        load(row(), chat_template=True)


def test_fields_reach_into_objects_and_chat_messages(load):
    turns = [("system", "s"), ("user", "first"), ("assistant", "a"), ("user", "1+1=")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (prompt,) = load(
        {"data": {"chat": messages}, "reward_model": {"ground_truth": "2"}},
        prompt_field="data.chat",
        answer_field="reward_model.ground_truth",
    )
    assert (prompt.text, prompt.answer) == ("1+1=", "2")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_field": "problem"}, r"train.jsonl:1: no field 'problem' \(data.prompt_field\).*has prompt, answer"),
        ({"answer_field": "gold.answer"}, r"no field 'gold.answer' \(data.answer_field\).*'gold' should be"),
        ({"answer_field": "answer.text"}, r"where 'text' should be, the row is str"),
    ],
)
def test_missing_field_names_the_row_and_the_known_ones(load, keys, message):
    with pytest.raises(ConfigError, match=message):
        load(row(), **keys)


@pytest.mark.parametrize(("answer", "expected"), [("34", "34"), (34, "34"), (-7, "-7"), (10**30, "1" + "0" * 30)])
def test_answers_become_text(load, answer, expected):
    assert load(row(answer=answer))[0].answer == expected


@pytest.mark.parametrize("answer", [34.0, 0.5, True, None, "", "  ", ["34"]])
def test_unclear_answers_are_refused(load, answer):
    with pytest.raises(ConfigError, match=r"train.jsonl:2: the answer in answer must be text or an integer"):
        load(row(), row(answer=answer))


@pytest.mark.parametrize("question", [7, None, " ", [{"role": "user", "content": [{"type": "image"}]}]])
def test_unclear_questions_are_refused(load, question):
    with pytest.raises(ConfigError, match=r"train.jsonl:1: the question in prompt must be text"):
        load(row(question))


def test_chat_without_a_user_turn_is_refused(load):
    with pytest.raises(ConfigError, match="without a chat message of role 'user'"):
        load(row([{"role": "system", "content": "s"}]))


def test_prompt_at_the_limit_stays(load):
    assert len(load(row("1+1="), max_prompt_tokens=5)) == 1


def test_long_prompts_are_refused_with_both_remedies(load):
    message = (
        r"2 of 3 prompts .* longer than data.max_prompt_tokens\(5\), the first train.jsonl:2 with 6 tokens; "
        r"set data.max_prompt_tokens=8 or data.long_prompts=drop"
    )
    with pytest.raises(ConfigError, match=message):
        load(row("1+1="), row("10+1="), row("100+100"), max_prompt_tokens=5)


def test_messages_that_are_left_out_are_counted(load, caplog):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    load(row(turns), row(turns[1:]))
    assert "1 of 2 prompts of" in caplog.text and "other chat messages beside the user's last one" in caplog.text
    caplog.clear()
    load(row(turns[1:]))
    assert not caplog.text


def test_half_a_character_in_an_answer_is_refused(load):
    with pytest.raises(ConfigError, match="the answer in answer has half a character"):
        load({"prompt": "1+1=", "answer": "2\ud800"})


def test_long_prompts_are_dropped_and_counted(load, caplog):
    kept = load(row("1+1="), row("10+1="), row("2+2="), max_prompt_tokens=5, long_prompts="drop")
    assert [prompt.uid for prompt in kept] == ["train.jsonl:1", "train.jsonl:3"]
    assert "1 of 3 prompts" in caplog.text
    with pytest.raises(ConfigError, match="leaves none"):
        load(row("10+1="), max_prompt_tokens=5, long_prompts="drop")


def test_a_prompt_that_the_tokenizer_changes_is_refused(load):
    with pytest.raises(ConfigError, match=r"changes 1 of 2 prompts. The first is train.jsonl:2: .*'A' becomes tokens"):
        load(row(), row("A+1="))


@pytest.mark.parametrize("chat_template", [False, True])
def test_special_tokens_around_a_prompt_are_no_change(load, chat_template):
    assert len(load(row("1+ 1\n="), row("<user>"), chat_template=chat_template)) == 2
