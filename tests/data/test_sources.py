import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.data.sources import read_rows
from dapo_megatron.errors import ConfigError


def rows(source):
    return list(read_rows(str(source)))


def test_json_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": "1+1", "a": "\u2028é"}\n\n{"q": "2+2"}', encoding="utf-8")
    assert rows(path) == [("train.jsonl:1", {"q": "1+1", "a": "\u2028é"}), ("train.jsonl:3", {"q": "2+2"})]


def test_json_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": 1}\nbroken\n')
    assert next(iter(read_rows(str(path)))) == ("train.jsonl:1", {"q": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"q": 1}\n{"q": \n', r"train.jsonl:2 is not JSON"),
        (b'{"q": 1}\n[1, 2]\n', r"train.jsonl:2 must be a JSON object.*got list"),
        (b'{"q": "\xff"}\n', r"train.jsonl:1 is not JSON"),
        (b"[" * 100_000, r"train.jsonl:1 is not JSON"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
    ],
)
def test_broken_json_lines(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        rows(path)


def test_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    values = [{"q": [{"role": "user", "content": "1+1"}], "r": {"a": "2"}}, {"q": [], "r": {"a": "3"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    assert rows(path) == [("train.parquet:1", values[0]), ("train.parquet:2", values[1])]


def test_broken_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"cannot read .*train.parquet as parquet"):
        rows(path)
    pyarrow.parquet.write_table(pyarrow.table({"q": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ConfigError, match="holds no rows"):
        rows(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        rows(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        rows(tmp_path / "folder.jsonl")
    with pytest.raises(ConfigError, match=r"expected a \.jsonl or \.parquet file, or hub:"):
        rows(tmp_path / "train.csv")


@pytest.mark.parametrize("source", ["hub:", "hub:a/b/c/d", "hub:a//test"])
def test_hub_names(source):
    with pytest.raises(ConfigError, match=r"hub:NAME\[/SPLIT\]"):
        rows(source)


def test_hub_without_network(tmp_path):
    code = "from dapo_megatron.data.sources import read_rows; next(read_rows('hub:owner/name/test'))"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, timeout=120)
    assert "ConfigError: cannot load split 'test' of 'owner/name' from the Hugging Face hub" in done.stderr


def test_import_needs_no_heavy_library():
    modules = ", ".join(f"dapo_megatron.data.{name}" for name in ("sources", "prompts", "stream", "tokenizer"))
    code = f"import sys, {modules}; print({{'torch', 'transformers', 'datasets', 'pyarrow'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
