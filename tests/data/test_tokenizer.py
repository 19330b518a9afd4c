import json

import numpy as np
import pytest
from transformers import AutoTokenizer, PythonBackend

from dapo_megatron.data.tokenizer import decoder, end_token_ids, load_tokenizer
from dapo_megatron.errors import ConfigError


def test_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("1+2=")["input_ids"] == tokenizer("1+2=")["input_ids"]
    assert loaded.eos_token_id == 0


def test_the_file_counts_whatever_the_type_of_the_model(tokenizer, tmp_path):
    """transformers builds Qwen2's own pre-tokenizer around this vocabulary, and drops the blanks."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    expected = tokenizer("1 + 2\n=")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)("1 + 2\n=")["input_ids"] != expected
    assert load_tokenizer(tmp_path)("1 + 2\n=")["input_ids"] == expected


def test_a_checkpoints_own_class_is_used_where_it_is_trusted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    assert type(load_tokenizer(folder)).__name__ != "Own"
    assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "Own"


def test_text_is_decoded_as_it_was_written(tokenizer):
    tokenizer.clean_up_tokenization_spaces = True  # would take the blank before the question mark away
    ids = np.array([*tokenizer("is 1 ?")["input_ids"], tokenizer.eos_token_id], np.int32)
    assert decoder(tokenizer)(ids) == "is 1 ?"
    assert decoder(tokenizer)(ids[:0]) == ""


def test_tokenizers_of_any_kind_are_decoded_alike(tokenizer):
    class Shouts(type(tokenizer)):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    ids = np.array([tokenizer.eos_token_id, *tokenizer("is 1 ?")["input_ids"]], np.int32)
    loud = Shouts(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    assert decoder(loud)(ids) == "IS 1 ?"


def test_ids_beyond_the_vocabulary_are_passed_over(tokenizer):
    """A model's vocabulary is padded, and a random or young one may well write what no token has."""

    class Letters(PythonBackend):
        def get_vocab(self):
            return {"a": 0, "b": 1}

        @property
        def vocab_size(self):
            return 2

        def _convert_id_to_token(self, index):
            return "ab"[index]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    ids = np.array([0, 1, 2, 99], np.int32)
    assert decoder(Letters())(ids) == "ab"
    known = tokenizer("ab")["input_ids"]
    assert decoder(tokenizer)(np.array([*known, len(tokenizer), 999], np.int32)) == "ab"


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
