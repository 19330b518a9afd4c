"""What transformers loads, in a process of its own, from a folder that a run has saved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.weights.side_files import copy_side_files, declare_tokenizer
from examples.quickstart import sums
from tests.helpers.checkpoint import write_checkpoint, write_tokenizer
from tests.helpers.models import make_config, save_qwen2

TEXTS = ["Answer: 21", " 1+2 =\n\t3", "求 é e\u0301 🙂", "12345 I'LL"]
LOAD = """
import json, sys
from transformers import AutoTokenizer
for trust in (None, False, True):
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)
    print(json.dumps(tokenizer(json.loads(sys.argv[2]))["input_ids"]))
"""


def auto_ids(folder: Path) -> list[list[int]]:
    """The ids of TEXTS, which must be the same whether code of the checkpoint is trusted or not."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), json.dumps(TEXTS)],
        env=os.environ | {"HF_HOME": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    undecided, untrusted, trusted = map(json.loads, done.stdout.splitlines())
    assert undecided == untrusted == trusted
    return undecided


def saved(source: Path, target: Path) -> Path:
    target.mkdir()
    copy_side_files(source, target)
    declare_tokenizer(target)
    return target


def test_one_token_per_character(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    want = PreTrainedTokenizerFast.from_pretrained(source)(TEXTS)["input_ids"]
    assert auto_ids(source) != want
    assert auto_ids(saved(source, tmp_path / "hf")) == want


def test_a_checkpoint_saved_by_the_actor(tmp_path: Path) -> None:
    """From start to end: what the run encodes with, and what people load when it is over."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.topology import process_groups
    from dapo_megatron.hf_folder import read_hf_config
    from dapo_megatron.weights.hf import HfCheckpoint

    source, target = tmp_path / "model", tmp_path / "hf"
    save_qwen2(source, tied=True)
    write_tokenizer(source, end_token=True)
    config = make_config(source)
    topology.initialize(config.parallel)
    try:
        hf_config = read_hf_config(source)
        settings = transformer_config(hf_config, config.model, config.parallel, config.memory)
        chunks = build_chunks(hf_config, config.model, settings, process_groups())
        checkpoint = HfCheckpoint(source)
        checkpoint.load(chunks)
        checkpoint.save(chunks, target)
    finally:
        topology.shutdown()
    assert auto_ids(target) == load_tokenizer(source)(TEXTS)["input_ids"] == load_tokenizer(target)(TEXTS)["input_ids"]


def test_the_quick_starts_tokenizer_needs_no_declaration(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    sums.tokenizer().save_pretrained(source)
    target = saved(source, tmp_path / "hf")
    assert not list(target.glob("*.py"))
    written = [sums.VOCABULARY[token] for token in auto_ids(target)[0]]
    assert written == ["Answer:", " ", "2", "1"]


def test_nothing_is_declared_twice(tmp_path: Path) -> None:
    """A run that goes on from a saved checkpoint writes the same files."""
    first = saved(write_checkpoint(tmp_path / "model"), tmp_path / "first")
    second = saved(first, tmp_path / "second")
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in second.iterdir()
    }


def test_without_a_tokenizer_config(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (source / "tokenizer_config.json").unlink()
    want = PreTrainedTokenizerFast.from_pretrained(source)(TEXTS)["input_ids"]
    assert auto_ids(saved(source, tmp_path / "hf")) == want


def qwen2_file(folder: Path) -> None:
    """As Qwen2.5 has it: by options that say nothing, its tokenizer.json is not what transformers would write."""
    merges: Any = [("1", "2")]  # which its annotation does not allow
    tokenizer = Qwen2Tokenizer({"<|endoftext|>": 0, "1": 1, "+": 2, "2": 3, "12": 4}, merges)
    tokenizer.save_pretrained(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    file["pre_tokenizer"]["pretokenizers"][1] = file["decoder"] = file["post_processor"] = level
    (folder / "tokenizer.json").write_text(json.dumps(file))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            "0": {
                "content": "<|endoftext|>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_that_transformers_reads_right_is_copied_as_it_is(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    qwen2_file(source)
    target = saved(source, tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not list(target.glob("*.py"))
    assert auto_ids(target) == PreTrainedTokenizerFast.from_pretrained(source)(TEXTS)["input_ids"]


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_part_that_differs_is_kept(tmp_path: Path, part: str) -> None:
    source = write_checkpoint(tmp_path / "model")
    qwen2_file(source)
    file = json.loads((source / "tokenizer.json").read_text())
    file[part] = None
    (source / "tokenizer.json").write_text(json.dumps(file))
    target = saved(source, tmp_path / "hf")
    assert json.loads((target / "tokenizer_config.json").read_text())["auto_map"]
    assert auto_ids(target) == PreTrainedTokenizerFast.from_pretrained(source)(TEXTS)["input_ids"]


def test_a_checkpoint_with_code_of_its_own_is_copied_as_it_is(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    config = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    target = saved(source, tmp_path / "hf")
    assert json.loads((target / "tokenizer_config.json").read_text()) == config


def test_shard_lists_stay_behind(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (source / "model.safetensors.index.json").write_text("{}")
    names = {file.name for file in saved(source, tmp_path / "hf").iterdir()}
    assert "config.json" in names
    assert not names & {"model.safetensors", "model.safetensors.index.json"}
