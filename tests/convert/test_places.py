from __future__ import annotations

from pathlib import Path

import pytest

from dapo_megatron.convert.dist_files import CheckpointError
from dapo_megatron.convert.places import Place, resolve


def megatron(folder: Path, *, hf: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "metadata.json").touch()
    if hf:
        (folder / "hf").mkdir()
        (folder / "hf/config.json").touch()
    return folder


def test_a_folder_of_each_kind_is_itself(tmp_path: Path) -> None:
    folder = megatron(tmp_path / "a", hf=True)
    assert resolve(folder) == Place(folder, is_megatron=True, hf=folder / "hf")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").touch()
    assert resolve(tmp_path / "b") == Place(tmp_path / "b", is_megatron=False)


@pytest.mark.parametrize("name", ["release", "iter_0000010"])
def test_megatron_lms_tracker_is_followed(name: str, tmp_path: Path) -> None:
    megatron(tmp_path / "iter_0000010")
    megatron(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n" if name == "release" else "10\n")
    place = resolve(tmp_path)
    assert place.folder == tmp_path / name
    assert place.step == (None if name == "release" else 10)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").touch()
    assert resolve(tmp_path).hf == tmp_path / "hf"


def test_a_tracker_that_points_nowhere_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latest_checkpointed_iteration.txt"
    file.write_text("20")
    with pytest.raises(
        CheckpointError, match=r"latest_checkpointed_iteration\.txt points to iter_0000020, which holds"
    ):
        resolve(tmp_path)
    file.write_text("../../etc")
    with pytest.raises(CheckpointError, match=r"says '\.\./\.\./etc'; a number or 'release' is expected"):
        resolve(tmp_path)


@pytest.mark.parametrize("inner", ["", "model"])
def test_of_a_run_the_newest_complete_step_is_taken(inner: str, tmp_path: Path) -> None:
    for step in (8, 9, 10):
        megatron(tmp_path / f"checkpoints/step-{step}" / inner)
    (tmp_path / "checkpoints/step-10/hf").mkdir()
    (tmp_path / "checkpoints/step-10/hf/config.json").touch()
    (tmp_path / "checkpoints/step-11").mkdir()
    want = tmp_path / "checkpoints/step-10" / inner
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step-10"):
        assert resolve(path) == Place(want, is_megatron=True, step=10, hf=tmp_path / "checkpoints/step-10/hf")
    (tmp_path / "checkpoints/latest").write_text("step-9")
    assert resolve(tmp_path).step == 9
    (tmp_path / "checkpoints/latest").write_text("step-11")
    assert resolve(tmp_path).step == 10


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: neither metadata\.json \(Megatron\), nor latest"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints, step-3 the newest, is complete"):
        resolve(tmp_path)
