from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.prepare.sets import SETS
from dapo_megatron.prepare.sources import Source, find

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\ntags:\n- math\nlicense: cc-by-4.0\n---\n# Data\nlicense: none of these\n"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")


def look(word: str, folder: Path | None) -> Source:
    return find(word, folder, print)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aime-2025.jsonl", "aime-2024.jsonl"], ["aime-2025.jsonl"]),
        (["aime-2025.parquet"], ["aime-2025.parquet"]),
        ([f"aime-2025.part{n}.jsonl" for n in (10, 2, 1)], [f"aime-2025.part{n}.jsonl" for n in (1, 2, 10)]),
        (["math-ai/aime25/test.jsonl", "math-ai/aime25/README.md"], ["test.jsonl"]),
    ],
)
def test_how_files_may_be_laid_out(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    touch(tmp_path, *names)
    source = look("aime-2025", tmp_path)
    assert [file.name for file in source.files] == expected
    assert (source.name, source.known, source.revision) == ("aime-2025", SETS["aime-2025"], None)
    assert source.licence and source.licence.startswith("none known")


def test_a_downloaded_repository_tells_its_licence(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "openai/gsm8k/main/test-0.parquet",
        "openai/gsm8k/main/train-0.parquet",
        "openai/gsm8k/other/test.parquet",
    )
    (tmp_path / "openai/gsm8k/README.md").write_text(CARD)
    source = look("gsm8k-test", tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in source.files] == ["openai/gsm8k/main/test-0.parquet"]
    assert (source.repository, source.licence) == ("openai/gsm8k", "cc-by-4.0 by its data card")


def test_a_set_that_is_not_there_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    command = "`hf download math-ai/aime25 --repo-type dataset --local-dir DIR/math-ai/aime25`"
    with pytest.raises(ConfigError, match=rf"--from {tmp_path} has no aime-2025: looked for .*{re.escape(command)}"):
        look("aime-2025", tmp_path)
    with pytest.raises(ConfigError, match=r"--from .*/nowhere is no folder"):
        look("aime-2025", tmp_path / "nowhere")


@pytest.mark.parametrize("other", ["aime-2025.parquet", "aime-2025.part1.jsonl", "math-ai/aime25/test.jsonl"])
def test_a_set_that_is_there_twice_is_refused(tmp_path: Path, other: str) -> None:
    touch(tmp_path, "aime-2025.jsonl", other)
    with pytest.raises(ConfigError, match=rf"has aime-2025 more than once: .*{other}.*; leave one"):
        look("aime-2025", tmp_path)


@pytest.mark.parametrize(
    ("word", "offline", "said"),
    [
        ("aime-2023", False, "no data set 'aime-2023': give one of dapo-math-17k, aime-2024, "),
        ("hub:math-ai/aime25", False, "no data set 'hub:math-ai/aime25': .* hub:OWNER/NAME:FILES"),
        ("own.csv", False, "no data set 'own.csv': .* or a .parquet or .jsonl file"),
        ("nowhere.jsonl", False, "cannot read nowhere.jsonl: there is no such file"),
        ("aime-2025@abc", True, "has no revision; leave @abc away"),
        ("hub:a/b:*.jsonl", True, "hub:a/b:.* is on the hub, and --from .* is for use without it; give a file"),
    ],
)
def test_words_that_name_nothing(tmp_path: Path, word: str, offline: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        look(word, tmp_path if offline else None)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    touch(tmp_path, "own.jsonl")
    assert look(str(tmp_path / "own.jsonl"), tmp_path) == Source("own", (tmp_path / "own.jsonl",))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download wants: what a revision holds, and the files of it."""

    row = b'{"problem": "1+1", "answer": 2}\n'
    files = {"README.md": CARD.encode(), "test-0.jsonl": row, "test-1.jsonl": row * 50_000, "a/b.txt": b"x"}
    seen: list[str] = []
    cut = False
    """Whether a large file breaks off in the middle."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, _, _ = self.path.partition("?")
        if path.startswith("/api/datasets/math-ai/aime25"):
            wanted = path.partition("/revision/")[2]
            if wanted in ("", "main", COMMIT):
                siblings = [{"rfilename": name} for name in self.files]
                return self.send(
                    200, json.dumps({"id": "math-ai/aime25", "sha": COMMIT, "siblings": siblings}).encode()
                )
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        prefix = f"/datasets/math-ai/aime25/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        content = self.files[path.removeprefix(prefix)]
        if body:
            self.seen.append(path.removeprefix(prefix))
        return self.send(200, content, {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT}, body=body)

    def send(self, code: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        breaks_off = self.cut and len(content) > 10_000
        if body:
            self.wfile.write(content[: len(content) // 2] if breaks_off else content)
        self.close_connection = breaks_off

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def hub() -> Iterator[str]:
    Hub.seen, Hub.cut = [], False
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


FIND = """
import sys
from dapo_megatron.errors import DapoError
from dapo_megatron.prepare.sources import find
try:
    source = find(sys.argv[1], None, print)
except DapoError as error:
    sys.exit(f"{error.exit_code} {error}")
print(source.repository, source.revision, source.licence, *(str(file.stat().st_size) for file in source.files))
"""


def download(word: str, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FIND, word]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)


def test_a_download_records_its_revision_and_licence_and_is_not_repeated(tmp_path: Path) -> None:
    with hub() as url:
        Hub.cut = True
        broken = download("aime-2025", url, tmp_path)
        assert broken.returncode == 1, broken
        assert "1 cannot get math-ai/aime25 from the Hugging Face hub" in broken.stderr
        Hub.seen, Hub.cut = [], False
        done = download("aime-2025", url, tmp_path)
        assert done.returncode == 0, done.stderr
        at, found = done.stdout.splitlines()
        assert at == f"aime-2025: math-ai/aime25 at {COMMIT}"
        assert found == f"math-ai/aime25 {COMMIT} cc-by-4.0 by its data card 32 1600000"
        assert Hub.seen == ["test-1.jsonl", "README.md"]
        Hub.seen = []
        assert download(f"hub:math-ai/aime25:*.jsonl@{COMMIT}", url, tmp_path).stdout.splitlines()[1] == found
        assert Hub.seen == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("aime-2025@abc", "2 math-ai/aime25 has no revision abc on the hub\n"),
        ("amc-2023", "2 the hub has no data set math-ai/amc23, or it is private: `hf auth login`\n"),
        (
            "hub:math-ai/aime25:*.txt",
            "2 math-ai/aime25 has no *.txt on the hub; it has README.md, test-0.j",
        ),
    ],
)
def test_what_the_hub_does_not_have(tmp_path: Path, word: str, said: str) -> None:
    with hub() as url:
        done = download(word, url, tmp_path)
    assert done.stderr.startswith(said)
