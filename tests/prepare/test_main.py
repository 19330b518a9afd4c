"""From sources to a folder that training reads, and what becomes of that folder where something goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from dapo_megatron import cli, config_file
from dapo_megatron.config import DataConfig
from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.prepare import main
from dapo_megatron.prepare.sets import TEMPLATE
from tests.helpers.checkpoint import values

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def problem(number: int) -> str:
    words = random.Random(number).sample("abcdefghijklmnopqrstuvwxyz", 12)
    return f"Problem {number}:\n\n  {'  '.join(words)}\t= ?"


def published(text: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": TEMPLATE.replace("{problem}", text), "role": "user"}],
        "reward_model": {"ground_truth": answer},
        "extra_info": {"index": "0"},
    }


ROWS = [
    *(published(problem(number), str(number)) for number in range(20)),
    published(problem(3), "3"),
    published(problem(4), "5"),
    published("见图 ![](https://a.org/b.png)", "1"),
    published("求 x + 1 = 3 的\n解。", "2"),
    published(problem(100).upper(), "100"),
]
LEFT = [*(problem(number) for number in range(20) if number != 4), "求 x + 1 = 3 的\n解。"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Published layouts: the training set a hundred times over, an evaluation set 32 times."""
    monkeypatch.setattr(main, "exit_when_ended", lambda: None)  # signals are this process's own
    folder = tmp_path / "data"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 100), folder / "dapo-math-17k.parquet")
    held_out = [published(problem(number), str(number)) for number in (100, 101)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held_out * 32), folder / "aime-2024.parquet")
    return folder


def prepare(data: Path, *arguments: str | Path) -> int:
    target = data.parent / "out"
    return main.prepare_data([str(target), "--from", str(data), "--eval", "aime-2024", *map(str, arguments)])


def texts(path: Path) -> list[str]:
    return [row["prompt"] for row in pyarrow.parquet.read_table(path).to_pylist()]


def left(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"data"}


def test_repeats_contradictions_images_and_held_out_problems_are_left_out(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(data) == 0
    out = data.parent / "out"
    assert texts(out / "train.parquet") == LEFT
    assert texts(out / "aime-2024.parquet") == [problem(100), problem(101)]
    card = json.loads((out / "card.json").read_text())
    assert [(step["filter"], step["removed"], step["left"]) for step in card["train"]["filters"]] == [
        *(("repeats", 2477, 23), ("contradictory", 1, 22), ("images", 1, 21), ("overlap", 1, 20)),
    ]
    assert card["train"]["languages"] == {"en": 19, "zh": 1}
    assert card["evaluation"]["aime-2024"]["rows"] == 64
    assert card["overlap"]["sets"] == {"aime-2024": {"problems": 1, "removed": 1, "kept": 0}}
    removed = [json.loads(line) for line in (out / "removed.jsonl").read_text().splitlines()]
    assert [(row["filter"], row["uid"].partition(":")[2]) for row in removed] == [
        *(("contradictory", "5"), ("images", "23"), ("overlap", "25")),
    ]
    assert "见图" in (out / "removed.jsonl").read_text()
    (pair,) = [json.loads(line) for line in (out / "overlap.jsonl").read_text().splitlines()]
    assert (pair["uid"], pair["evaluation_set"], pair["evaluation_uid"]) == (
        *("dapo-math-17k.parquet:25", "aime-2024", "aime-2024.parquet:1"),
    )
    assert (pair["ngram"], pair["shared"], pair["of"], pair["removed"]) == (8, 7, 7, True)
    said = capsys.readouterr().err
    assert "train: 2,500 rows\ntrain: repeats: 2,477 left out, 23 stay\n" in said
    assert "train: overlap: 1 left out, 20 stay\n" in said


def test_hashes_and_licences_are_in_the_card(data: Path) -> None:
    assert prepare(data) == 0
    out = data.parent / "out"
    card = json.loads((out / "card.json").read_text())
    (source,) = card["train"]["sources"]
    assert source["licence"] == "apache-2.0 by its data card"
    (file,) = source["files"]
    assert file["sha256"] == hashlib.sha256((data / "dapo-math-17k.parquet").read_bytes()).hexdigest()
    written = left(out) - {"card.json", "README.md"}
    assert set(card["files"]) == written == {"train.parquet", "aime-2024.parquet", "removed.jsonl", "overlap.jsonl"}
    for name in written:
        assert card["files"][name]["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    readme = (out / "README.md").read_text()
    assert (
        f"| dapo-math-17k |  |  | apache-2.0 by its data card | dapo-math-17k.parquet | {file['bytes']:,} |" in readme
    )
    assert "| contradictory | copies have different answers; none is kept | 1 | 22 |" in readme
    assert "| aime-2024 | 64 | 2 | en 2 |" in readme


def test_the_same_input_gives_the_same_bytes(data: Path) -> None:
    assert prepare(data) == 0
    out, first = data.parent / "out", data.parent / "first"
    out.rename(first)
    assert prepare(data) == 0
    for file in first.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


def test_training_reads_it_and_gives_the_published_prompts(
    data: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dapo_megatron.data.tokenizer import load_tokenizer

    assert prepare(data, "--tokenizer", tokenizer_folder, "--max-tokens", "400") == 0
    sections = yaml.safe_load(capsys.readouterr().out)
    assert sections["eval"] == {"data": str(data.parent / "out/aime-2024.parquet")}
    config = DataConfig(**sections["data"])
    prompts = load_prompts(config, load_tokenizer(tokenizer_folder), config.train)
    assert [prompt.text for prompt in prompts] == [
        f"<user>{TEMPLATE.replace('{problem}', text)}<reply>" for text in LEFT
    ]
    assert [prompt.answer for prompt in prompts[:5]] == ["0", "1", "2", "3", "5"]


def test_prompts_that_are_too_long_are_left_out_as_training_counts_them(data: Path, tokenizer_folder: Path) -> None:
    around = len(TEMPLATE.encode()) - len("{problem}") + 2
    longest = max(len(text.encode()) for text in LEFT)
    limit = around + longest - 1
    assert prepare(data, "--tokenizer", tokenizer_folder, "--max-tokens", str(limit)) == 0
    out = data.parent / "out"
    kept = [text for text in LEFT if len(text.encode()) < longest]
    assert 0 < len(kept) < len(LEFT)
    assert texts(out / "train.parquet") == kept
    long = [json.loads(line) for line in (out / "removed.jsonl").read_text().splitlines()][3:]
    assert {(row["filter"], row["tokens"]) for row in long} == {("length", limit + 1)}


def test_a_config_says_how_prompts_are_made(
    data: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = values(tmp_path)
    given["train"]["micro_batch_tokens"] = 128
    given["model"]["path"] = str(tokenizer_folder)
    given["data"] = {"train": "a.parquet", "template": "Q: {problem}", "max_prompt_tokens": 56}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert prepare(data, "--config", path) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"] == {
        "train": str(tmp_path / "out/train.parquet"),
        "template": "Q: {problem}",
        "chat_template": False,
        "max_prompt_tokens": 56,
    }
    assert texts(tmp_path / "out/train.parquet") == [text for text in LEFT if len(text.encode()) <= 53]
    given["data"]["prompt_field"] = "question"
    path.write_text(yaml.safe_dump(given))
    (tmp_path / "out").rename(tmp_path / "first")
    assert prepare(data, "--config", path) == 2
    assert "has data.prompt_field=question, but the files have 'prompt'" in capsys.readouterr().err


def test_ones_own_data_in_several_files(data: Path, tmp_path: Path) -> None:
    own = [
        {"frage": " Wie viel ist 1+1? \n", "antwort": 2, "language": "de"},
        {"frage": "1 + 1 は?", "antwort": "2", "language": "ja"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in own))
    arguments = ["--train", f"dapo-math-17k,{tmp_path / 'own.jsonl'}", "--languages", "de,zh"]
    assert prepare(data, *arguments, "--prompt-field", "frage", "--answer-field", "antwort") == 0
    rows = pyarrow.parquet.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert rows[1] == {
        "prompt": " Wie viel ist 1+1? \n",
        "answer": "2",
        "uid": "own.jsonl:1",
        "source": "own",
        "language": "de",
    }
    assert [row["source"] for row in rows] == ["dapo-math-17k", "own"]


def test_messages_that_are_not_taken_over_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = {"role": "system", "content": "Answer in French."}
    for name, numbers in (("own", (1, 2)), ("heldout", (3,))):
        rows = [
            {"prompt": [system, {"role": "user", "content": problem(number)}], "answer": str(number)}
            for number in numbers
        ]
        rows.append({"prompt": [{"role": "user", "content": problem(9 + len(numbers))}], "answer": "9"})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert prepare(data, "--train", tmp_path / "own.jsonl", "--eval", tmp_path / "heldout.jsonl") == 0
    said = capsys.readouterr().err
    assert "warning: train: 2 problems with other chat messages beside the user's last one" in said
    assert "warning: heldout: 1 problem with other chat messages" in said and "data.template" in said


def test_several_evaluation_sets_are_all_in_the_sections_to_train_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "评测.jsonl").write_text(json.dumps({"prompt": "一加一等于几?", "answer": 2}), "utf-8")
    assert prepare(data, "--eval", f"aime-2024,{tmp_path / '评测.jsonl'}") == 0
    sections = yaml.safe_load(capsys.readouterr().out)
    files = {name: Path(part["data"]).name for name, part in sections["eval"]["sets"].items()}
    assert files == {"aime-2024": "aime-2024.parquet", "set2": "评测.parquet"}
    config = config_file.parse({"model": {"path": "x"}, **sections})
    assert list(config.held_out) == list(files)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train", "nothing"], "no data set 'nothing'"),
        (["--train", "dapo-math-17k,"], "between commas there is nothing"),
        (["--eval", "dapo-math-17k"], "dapo-math-17k is to be trained on and held out"),
        (["--eval", "gsm8k-test"], "has no gsm8k-test"),
        (["--eval", "data/train.jsonl"], "train.parquet is the name of the training set's file"),
        (["--train", "data/a/x.jsonl,data/b/x.jsonl"], "--train has two sets called x"),
        (["--eval", "data/b/x.jsonl"], "--eval x: 1 problem with different answers, such as 1 in x.jsonl:1, 2 in"),
        (["--train", "data/a/x.jsonl"], "x.jsonl:1: no field with the answer"),
        (["--languages", "fr"], "no problem is fr; there are en 20, zh 1"),
        (["--ngram", "0"], "--ngram 0: a run has at least 1 word"),
        (["--overlap", "50"], "--overlap 50: a share is above 0 and at most 1"),
        (["--max-tokens", "9"], "--max-tokens 9 needs a tokenizer to count with"),
        (["--max-tokens", "0"], "--max-tokens 0: at least 1 is needed"),
        (["--tokenizer", "data"], "no tokenizer in data"),
        (["--from", "nowhere"], "--from nowhere: no such folder"),
    ],
)
def test_input_that_cannot_work_is_answered_with_2(
    data: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    one, other = '{"problem": "p", "answer": 1}\n', '{"problem": "q", "answer": 1}\n'
    files = {"a/x": '{"problem": "p"}\n', "b/x": one + one.replace("1", "2") + other, "train": one}
    for name, content in files.items():
        (data / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (data / f"{name}.jsonl").write_text(content)
    assert prepare(data, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not left(data.parent)


def test_a_folder_that_is_there_is_left_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data.parent / "out").mkdir()
    assert prepare(data) == 2
    assert "out is there already; give another name" in capsys.readouterr().err
    assert not any((data.parent / "out").iterdir())


@pytest.mark.parametrize("command", ["tool", "command"])
def test_help_has_exit_codes_and_where_to_read_on(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.prepare_data(["--help"]) if command == "tool" else cli.main(["prepare", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done, 1 the hub" in said and "docs/data.md" in said and "gsm8k-train" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_where_only_printing_fails_the_folder_is_said_to_be_complete(data: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, TOOL, data.parent / "out", "--from", data, "--eval", "aime-2024"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=250, check=False)
    assert ended.returncode == 1
    assert f"No space left on device; {data.parent / 'out'} is complete, and README.md in it says how" in ended.stderr
    assert (data.parent / "out/card.json").is_file()


def program(data: Path, *arguments: str, code: str | None = None, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(["-c", code] if code else [str(TOOL)]), str(data.parent / "out"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(data: Path, tmp_path: Path) -> None:
    with program(
        data, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "data/hf"), HF_HUB_OFFLINE="0"
    ) as process:
        said = process.communicate(timeout=250)[1]
    assert process.returncode == 1, said
    assert said.startswith(
        "dapo-megatron: error: cannot get BytedTsinghua-SIA/DAPO-Math-17k from the Hugging Face hub: "
    )
    assert said.endswith("Without a network, give --from DIR with the files (docs/data.md has how they are laid out)\n")
    assert not left(tmp_path)


FULL = """
import resource, sys
from dapo_megatron.prepare import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
sys.exit(main.prepare_data(sys.argv[1:]))
"""
SLOW = """
import sys, time
from dapo_megatron.prepare import main, output
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)
output.write_card = slow
sys.exit(main.prepare_data(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_leaves_nothing(data: Path) -> None:
    with program(data, "--from", str(data), "--eval", "aime-2024", code=FULL) as process:
        said = process.communicate(timeout=250)[1]
    assert process.returncode == 1, said
    assert "out: [Errno 27] File too large; nothing is left of it\n" in said
    assert not left(data.parent)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_the_middle_leaves_nothing(data: Path, number: signal.Signals, code: int) -> None:
    with program(data, "--from", str(data), "--eval", "aime-2024", code=SLOW) as process:
        assert process.stdout and process.stdout.readline() == "writing\n"
        assert {name.split("-")[0] for name in left(data.parent)} == {"out.unfinished"}
        begun = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=250)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert time.monotonic() - begun < 30
    assert not left(data.parent)
