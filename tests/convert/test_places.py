from __future__ import annotations

from dataclasses import replace
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
    step = tmp_path / "checkpoints/step-10"
    latest = tmp_path / "checkpoints/latest"
    latest.write_text("step-10\n")
    want = Place(step / inner, is_megatron=True, step=10, hf=step / "hf", of_run=step)
    for path in (tmp_path, tmp_path / "checkpoints", step):
        assert resolve(path) == want
    latest.write_text("step-9")
    assert (resolve(tmp_path).step, resolve(tmp_path).problems) == (9, ())
    latest.write_text("step-7\n")
    assert resolve(tmp_path) == replace(want, problems=(f"{latest} says 'step-7', and there is no such checkpoint",))
    latest.unlink()
    assert resolve(tmp_path) == replace(want, problems=(f"{latest} is missing",))
    cut = tmp_path / "checkpoints/step-11"
    cut.mkdir()
    latest.write_text("step-11")
    assert resolve(tmp_path) == replace(want, problems=(f"{cut} has no metadata.json; it is not complete",))
    assert resolve(cut) == Place(cut, is_megatron=True, step=11, of_run=cut)


def test_a_checkpoint_of_a_run_is_known_by_what_lies_in_it_elsewhere(tmp_path: Path) -> None:
    other = megatron(tmp_path / "step-4")
    assert resolve(other).of_run is None
    (other / "state.json").touch()
    assert resolve(other).of_run == other
    renamed = megatron(tmp_path / "model")
    (renamed / "manifest.json").touch()
    assert resolve(renamed).of_run == renamed


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_run_without_a_checkpoint_is_told_from_a_folder_that_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint"):
        resolve(tmp_path / name)
    (tmp_path / "versions.json").touch()
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path} is a run that has saved no step yet \(checkpoint\.every\)$"
    ):
        resolve(tmp_path / name)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").touch()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/hf holds the model that it ended with$"):
        resolve(tmp_path / name)


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: neither metadata\.json \(Megatron\), nor latest"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere does not exist$"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file; give the folder that it lies in$"):
        resolve(tmp_path / "file")
    (tmp_path / "checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints, step-3 the newest, is complete"):
        resolve(tmp_path)
