"""The folder of a run's checkpoints, without ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo_megatron.checkpoint import folder as folders
from dapo_megatron.checkpoint.folder import BrokenCheckpointError, Manifest, UnreadableError

CONTENTS = {"__0_0.distcp": b"weights" * 100, "state.json": b"{}", "hf/config.json": b'{"vocab": 3}'}


def make(root: Path, step: int) -> Path:
    unfinished = folders.unfinished(root, step, "life")
    folders.write_files(unfinished, CONTENTS)
    files = {name: folders.describe(unfinished / name) for name in CONTENTS}
    manifest = Manifest(step, 2, {"tp": 2}, "bfloat16", "2026-11-28T09:30:00+00:00", "0.1", files)
    return folders.complete(unfinished, manifest)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_has_its_name_once_it_is_whole_and_latest_names_it(tmp_path: Path) -> None:
    unfinished = folders.unfinished(tmp_path, 10, "life")
    folders.write_files(unfinished, CONTENTS)
    assert folders.candidates(tmp_path) == ([], None)
    made = make(tmp_path, 10)
    assert names(tmp_path) == ["latest", "step-10"]
    assert (tmp_path / "latest").read_text() == "step-10\n"
    assert folders.candidates(tmp_path) == ([made], None)
    manifest = folders.read_manifest(made)
    assert (manifest.step, manifest.parallel) == (10, {"tp": 2})
    for name, file in manifest.files.items():
        folders.check_file(made, name, file)


def test_the_one_that_latest_names_comes_first_then_those_before_it(tmp_path: Path) -> None:
    made = {step: make(tmp_path, step) for step in (9, 10, 100)}
    assert folders.candidates(tmp_path)[0] == [made[100], made[10], made[9]]
    (tmp_path / "latest").write_text("step-10")
    assert folders.candidates(tmp_path) == ([made[10], made[9]], None)


@pytest.mark.parametrize("text", ["step-7", "", "../../etc", "step-10/../step-9", "\x00\xff"])
def test_a_pointer_to_nowhere_is_told_and_all_are_looked_at(tmp_path: Path, text: str) -> None:
    made = [make(tmp_path, 9)]
    (tmp_path / "latest").write_text(text)
    found, problem = folders.candidates(tmp_path)
    assert found == made
    assert problem and "latest" in problem and "no such checkpoint" in problem


def test_a_missing_pointer_is_told(tmp_path: Path) -> None:
    made = make(tmp_path, 9)
    (tmp_path / "latest").unlink()
    assert folders.candidates(tmp_path) == ([made], f"{tmp_path / 'latest'} is missing")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 699 bytes; 700 were written"),
        (lambda path: path.write_bytes(b"V" + path.read_bytes()[1:]), "SHA-256 differs"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, harm: object, said: str) -> None:
    made = make(tmp_path, 3)
    harm(made / "__0_0.distcp")  # type: ignore[operator]
    file = folders.read_manifest(made).files["__0_0.distcp"]
    with pytest.raises(BrokenCheckpointError, match=said) as error:
        folders.check_file(made, "__0_0.distcp", file)
    assert "step-3/__0_0.distcp" in str(error.value)


def test_a_flipped_byte_is_not_seen_by_size_alone(tmp_path: Path) -> None:
    made = make(tmp_path, 3)
    (made / "state.json").write_bytes(b"[]")
    folders.check_file(made, "state.json", folders.read_manifest(made).files["state.json"], content=False)


@pytest.mark.parametrize("text", ["", "{}", '{"step": "x"}', "\x00"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    made = make(tmp_path, 3)
    (made / "manifest.json").write_text(text)
    with pytest.raises(BrokenCheckpointError, match=r"step-3/manifest\.json"):
        folders.read_manifest(made)


def test_the_last_ones_and_every_so_many_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        make(tmp_path, step)
    folders.prune(tmp_path, keep_last=2, keep_every=10)
    assert names(tmp_path) == ["latest", "step-10", "step-20", "step-25", "step-30"]
    folders.prune(tmp_path, keep_last=1, keep_every=None, best=20)
    assert names(tmp_path) == ["latest", "step-20", "step-30"]
    folders.prune(tmp_path, keep_last=1, keep_every=None)
    assert names(tmp_path) == ["latest", "step-30"]


def test_the_pointer_to_the_best_can_go_back(tmp_path: Path) -> None:
    make(tmp_path, 5)
    for step in (5, 10):
        folders.point(tmp_path, folders.BEST, step=step)
        assert (tmp_path / "best").read_text() == f"step-{step}\n"
    for _ in range(2):
        folders.point(tmp_path, folders.BEST, step=None)
        assert names(tmp_path) == ["latest", "step-5"]


def test_what_a_killed_run_left_is_cleared_and_written_anew(tmp_path: Path) -> None:
    made = make(tmp_path, 5)
    folders.write_files(folders.unfinished(tmp_path, 10, "life"), CONTENTS)
    (tmp_path / ".step-4.deleted").mkdir()
    folders.clear(tmp_path)
    assert names(tmp_path) == ["latest", "step-5"]
    (made / "state.json").write_text("older")
    make(tmp_path, 5)
    assert (made / "state.json").read_text() == "{}"


def test_a_file_of_another_machine_that_is_not_seen_here_is_no_checkpoint(tmp_path: Path) -> None:
    unfinished = folders.unfinished(tmp_path, 5, "life")
    folders.write_files(unfinished, CONTENTS)
    files = {name: folders.describe(unfinished / name) for name in CONTENTS}
    (unfinished / "__0_0.distcp").unlink()
    manifest = Manifest(5, 2, {}, "bfloat16", "", "", files)
    with pytest.raises(OSError, match="__0_0"):
        folders.complete(unfinished, manifest)
    assert folders.candidates(tmp_path) == ([], None)


def test_what_cannot_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, 3)

    def stale(path: Path) -> object:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(folders, "describe", stale)
    with pytest.raises(UnreadableError, match="Stale file handle"):
        folders.check_file(made, "state.json", folders.read_manifest(made).files["state.json"])


def test_those_of_more_steps_are_moved_aside_and_neither_looked_at_nor_deleted(tmp_path: Path) -> None:
    made = {step: make(tmp_path, step) for step in (10, 20, 30)}
    moved = folders.supersede(tmp_path, 10)
    assert sorted(path.name for path in moved) == ["step-20.aside", "step-30.aside"]
    make(tmp_path, 13)
    folders.prune(tmp_path, keep_last=1, keep_every=None)
    assert names(tmp_path) == ["latest", "step-13", "step-20.aside", "step-30.aside"]
    assert folders.candidates(tmp_path) == ([tmp_path / "step-13"], None)
    make(tmp_path, 20)
    assert [path.name for path in folders.supersede(tmp_path, 13)] == ["step-20.aside.1"]
    assert not made[20].exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "/x/common.pt"), "Permission denied: /x/common.pt"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4"), "{} takes no more ({} free, "),
        (RuntimeError("Connection closed by peer"), "RuntimeError: Connection closed by peer"),
    ],
)
def test_why_something_could_not_be_written(tmp_path: Path, error: Exception, says: str) -> None:
    said = re.sub(r"[\d,]+ bytes", "{}", folders.why(error, tmp_path).replace(str(tmp_path), "{}"))
    assert said.startswith(says) and "enforce" not in said
