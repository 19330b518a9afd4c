"""A run's checkpoint is compared with its manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_megatron.checkpoint.folder import Manifest, complete
from dapo_megatron.checkpoint.folder import describe as describe_file
from dapo_megatron.convert import main
from tests.helpers.conversion import add_sides, assert_same_tensors, tensors, to_megatron
from tests.helpers.models import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    add_sides(save_tiny(folder / "hf"))
    being_written = folder / "run/checkpoints/.step-3.unfinished"
    to_megatron(folder / "hf", being_written, tp=2)
    (being_written / "state.json").write_text("{}")
    names = [path.relative_to(being_written) for path in being_written.rglob("*") if path.is_file()]
    files = {str(name): describe_file(being_written / name) for name in names}
    parallel = {"tp": 2, "pp": 1, "vpp": 1, "cp": 1}
    complete(being_written, Manifest(3, 2, parallel, "float32", "2026-11-28T09:30:00+00:00", "0.1.0", files))
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(saved / "run", tmp_path / "run")


def inspect(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, list[str]]:
    code = main.inspect_checkpoint([str(path), "--json", *options])
    return code, json.loads(capsys.readouterr().out)["missing"]


def convert(capsys: pytest.CaptureFixture[str], path: Path, target: Path) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "_prepare", lambda: None)
        code = main.megatron_to_hf([str(path), str(target)])
    return code, capsys.readouterr().err


def test_a_whole_one(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, saved / "run") == (0, [])
    assert inspect(capsys, saved / "run", "--hashes") == (0, [])
    assert main.inspect_checkpoint([str(saved / "run/checkpoints/step-3")]) == 0
    said = capsys.readouterr().out
    assert "step 3\n" in said
    assert "saved 2026-11-28T09:30:00+00:00 by dapo-megatron 0.1.0, 2 ranks, tp(2) x pp(1) x vpp(1) x cp(1)\n" in said
    assert "files, compared by sizes only (--hashes reads them)\n" in said
    assert convert(capsys, saved / "run", tmp_path / "out")[0] == 0
    assert_same_tensors(tensors(tmp_path / "out"), tensors(saved / "hf"))


def garble(step: Path) -> None:
    (step / "manifest.json").write_text('{"step": "three"}')


def lead_outside(step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = {"bytes": 0, "sha256": ""}
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda step: (step / "state.json").unlink(), "state.json is missing"),
        (lambda step: (step / "hf/tokenizer.model").unlink(), "hf/tokenizer.model is missing"),
        (lambda step: (step / "state.json").write_text("{} "), "state.json has 3 bytes; 2 were written"),
        (lambda step: (step / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda step: os.truncate(step / "__1_0.distcp", 100), "__1_0.distcp has 100 bytes; "),
        (lambda step: (step / ".metadata").unlink(), ".metadata is missing"),
        (lambda step: (step / "metadata.json").unlink(), "metadata.json is missing"),
        (lambda step: (step / "common.pt").unlink(), "common.pt is missing"),
        (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing, so nothing tells whether"),
        (garble, "manifest.json cannot be read, so nothing tells what belongs there: Input should be a valid integer"),
        (lead_outside, "manifest.json names a file outside the folder, '../../../secret'"),
    ],
)
def test_damage_is_named_and_not_converted(
    damage: Callable[[Path], object], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = run / "checkpoints/step-3"
    damage(step)
    code, missing = inspect(capsys, step)
    assert (code, len(missing)) == (1, 1), missing
    assert missing[0].startswith(said)
    code, error = convert(capsys, step, tmp_path / "out")
    assert code == 2
    assert f"{step} is damaged: {said}" in error
    assert error.endswith("; copy it again, or take another step\n")
    assert not (tmp_path / "out").exists()


def test_hashes_find_what_sizes_do_not(run: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step-3/state.json").write_text("[]")
    assert inspect(capsys, run) == (0, [])
    code, missing = inspect(capsys, run, "--hashes")
    assert code == 1
    assert missing == ["state.json is not what was written: its SHA-256 differs from manifest.json's"]
    assert main.inspect_checkpoint([str(saved / "hf"), "--hashes"]) == 2
    assert "--hashes compares with manifest.json, which only a run's checkpoints have" in capsys.readouterr().err


def test_a_latest_that_names_nothing_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/latest").write_text("step-9\n")
    problem = f"{run}/checkpoints/latest says 'step-9', and there is no such checkpoint"
    assert inspect(capsys, run) == (1, [problem])
    code, said = convert(capsys, run, tmp_path / "out")
    assert code == 0
    assert said.startswith(f"warning: {problem}; {run}/checkpoints/step-3 is taken\n")
