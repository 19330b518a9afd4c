import pytest

from dapo_megatron.data.tokenizer import end_token_ids, load_tokenizer
from dapo_megatron.errors import ConfigError


def test_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("1+2=")["input_ids"] == tokenizer("1+2=")["input_ids"]
    assert loaded.eos_token_id == 0


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"none is not a folder"):
        load_tokenizer(tmp_path / "none")


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=r"no tokenizer in .*expected one of tokenizer.json"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_end_tokens(tokenizer):
    assert end_token_ids(tokenizer, [3, 0, 3]) == (0, 3)
    assert end_token_ids(tokenizer, []) == (0,)
    with pytest.raises(ConfigError, match=r"\[-1, 9999\] are not among"):
        end_token_ids(tokenizer, [-1, 9999])


def test_no_end_token(tokenizer):
    tokenizer.eos_token = None
    assert end_token_ids(tokenizer, [3]) == (3,)
    with pytest.raises(ConfigError, match="responses never end"):
        end_token_ids(tokenizer, [])
