from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout.token import TOKEN, given_token, keep_token, make_token, need_token, token_file


def config(folder: Path, **engine: Any) -> Config:
    run = {"dir": str(folder / "runs"), "name": "mine"}
    return parse({"model": {"path": "m"}, "data": {"train": "t"}, "run": run, "engine": engine})


def test_a_token_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    own = config(tmp_path)
    token = keep_token(own)
    path = tmp_path / "runs/mine-engines/token"
    assert path == token_file(own) and path.stat().st_mode & 0o777 == 0o600
    assert keep_token(own) == given_token(own, {}) == need_token(own) == token and len(token) >= 32
    assert not own.run.folder.exists(), "the run's folder may be read by others"
    assert keep_token(config(tmp_path, token_file=str(tmp_path / "other"))) != token


def test_of_several_that_start_at_once_one_makes_it(tmp_path: Path) -> None:
    own = config(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(lambda _: keep_token(own), range(32)))
    assert tokens == {token_file(own).read_text().strip()}
    assert [path.name for path in token_file(own).parent.iterdir()] == ["token"]


def test_a_full_disk_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", full)
        with pytest.raises(ConfigError, match="No space left on device; choose another place"):
            keep_token(own)
    assert not list(token_file(own).parent.iterdir())
    assert keep_token(own)


def test_the_environment_comes_first_and_is_not_written_down(tmp_path: Path) -> None:
    own, token = config(tmp_path), make_token()
    assert given_token(own, {TOKEN: token}) == token
    assert not (tmp_path / "runs").exists()


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    own = config(tmp_path)
    token = keep_token(own)
    for mode in (0o640, 0o604, 0o622):
        token_file(own).chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:o}") as error:
            need_token(own)
        assert token not in str(error.value)


@pytest.mark.parametrize("text", ["", "short", "with spaces in the midst of it", "zwölfzwölfzwölfzwölf"])
def test_what_is_no_token_is_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"this has {len(text)} characters") as error:
        given_token(config(tmp_path), {TOKEN: text})
    assert not text or text not in str(error.value)


def test_where_there_is_none_it_is_said_where_it_is_looked_for(tmp_path: Path) -> None:
    assert given_token(config(tmp_path), {}) is None
    with pytest.raises(ConfigError, match=r"(?s)DAPO_MEGATRON_ENGINE_TOKEN.*mine-engines/token"):
        need_token(config(tmp_path))
