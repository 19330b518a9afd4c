"""Weights through a folder, to engines that only keep what they read."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.config import WeightsConfig
from dapo_megatron.errors import EngineError, StorageError
from dapo_megatron.weights import shards, versions
from dapo_megatron.weights.buckets import describe
from dapo_megatron.weights.disk import DiskPublisher
from dapo_megatron.weights.publish import open_publisher
from dapo_megatron.weights.verify import Arrivals, Inventory
from dapo_megatron.weights.versions import read_version
from tests.weights.test_publish import INVENTORY, WEIGHTS, Keeper, Keepers


class Reader(Keeper):
    async def join_group(self, info: dict[str, Any]) -> None:
        self.arrivals = Arrivals(info["inventory"])

    async def receive(self, info: dict[str, Any]) -> None:
        sums = info["checksums"] and dict(zip(INVENTORY.names, info["checksums"], strict=True))
        with self.telling():
            self.before_reading(Path(info["folder"]))
            read_version(Path(info["folder"]), self.arrivals, sums, self.load)

    def before_reading(self, folder: Path) -> None: ...


def side_files(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared/weights"


def open_disk(folder: Path, *readers: Reader, **changes: Any) -> Any:
    config = WeightsConfig(transport="disk", **changes)
    return closing(open_publisher(config, INVENTORY, Keepers(*readers), folder=folder, side_files=side_files))


def small_files(folder: Path, *readers: Reader) -> closing[DiskPublisher]:
    return closing(DiskPublisher(INVENTORY, Keepers(*readers), folder, 32, side_files))


@pytest.mark.parametrize("verify", ["checksums", "off"])
def test_all_engines_load_each_version_and_the_last_one_stays(folder: Path, verify: str) -> None:
    readers = Reader("engine 0"), Reader("engine 1")
    with open_disk(folder, *readers, verify=verify) as publisher:
        for version, sign, name in ((1, 1, "1"), (5, -1, "5"), (5, -1, "5.2"), (5, -1, "5.3"), (6, 2, "6")):
            measures = publisher.push(((name, sign * tensor) for name, tensor in WEIGHTS.items()), version)
            assert [path.name for path in folder.iterdir()] == [f"version-{name}"]
            for reader in readers:
                assert reader.held[version].keys() == WEIGHTS.keys()
                assert all(torch.equal(reader.held[version][name], sign * WEIGHTS[name]) for name in WEIGHTS)
    assert measures["push/share"].value == 1 and measures["push/gb_per_second"].value > 0


def test_a_version_is_a_checkpoint_in_files_of_the_size_of_buckets(folder: Path) -> None:
    with small_files(folder, Reader("engine 0")) as publisher:
        publisher.push(WEIGHTS.items(), version=0)
    files = sorted((folder / "version-0").iterdir())
    assert [file.name for file in files] == [
        "config.json",
        *(f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert torch.equal(load_file(files[2])["w3"], WEIGHTS["w3"])


def test_only_versions_are_removed(folder: Path) -> None:
    for name in ("version-final", "version-1.5B", "version-1", "version-1.2", ".version-3.2.unfinished", "notes"):
        (folder / name).mkdir(parents=True)
    with small_files(folder, Reader("engine 0")) as publisher:
        publisher.push(WEIGHTS.items(), version=2)
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "version-1.5B", "version-2", "version-final"]


def test_an_engine_that_was_started_again_reads_the_whole_version(folder: Path) -> None:
    first, second = Reader("engine 0"), Reader("engine 0")
    keepers = Keepers(first)
    with closing(DiskPublisher(INVENTORY, keepers, folder, 1000)) as publisher:
        publisher.push(WEIGHTS.items(), version=1)
        keepers.keepers = (second,)
        publisher.push(WEIGHTS.items(), version=1)
    assert second.held[1].keys() == WEIGHTS.keys()


def test_where_the_disk_is_full_no_engine_loads_anything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full(tensors: Any, path: Path, **more: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, **more)

    reader = Reader("engine 0")
    said: list[Any] = []
    with closing(
        DiskPublisher(INVENTORY, Keepers(reader), folder, 32, side_files, lambda _, value: said.append(value))
    ) as publisher:
        publisher.push(WEIGHTS.items(), version=1)
        monkeypatch.setattr(shards, "save_file", full)
        said.clear()
        says = r"cannot write the weights of version 2 to .*/version-2: .*No space left on device.*takes \d+ bytes"
        with pytest.raises(StorageError, match=says):
            publisher.push(WEIGHTS.items(), version=2)
    assert said == ["bucket"] * 4 + ["end"], "the others gather to the end"
    assert list(reader.held) == [1]
    assert [path.name for path in folder.iterdir()] == ["version-1"]


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    try:
        weights = {"w": torch.zeros(100_000)}
        inventory, reader = Inventory(**describe(list(weights.items()))), Reader("engine 0")
        with (
            closing(DiskPublisher(inventory, Keepers(reader), small, 1000)) as publisher,
            pytest.raises(StorageError, match=r"No space left on device.*takes 400.0 kB, two are there"),
        ):
            publisher.push(weights.items(), version=1)
        assert not reader.held and not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_push_that_leaves_out_a_tensor_is_not_written(folder: Path) -> None:
    reader = Reader("engine 0")
    with small_files(folder, reader) as publisher, pytest.raises(EngineError, match="a push has left out w1"):
        publisher.push([*WEIGHTS.items()][1:], version=1)
    assert not reader.held and not list(folder.iterdir())


class Failing(Reader):
    """Fails as often as it is told to, and says what is in the folder each time that it is to read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.failures, self.seen = 0, list[list[str]]()

    def before_reading(self, folder: Path) -> None:
        self.seen.append(sorted(path.name for path in folder.parent.iterdir()))
        if self.failures:
            self.failures -= 1
            raise EngineError("engine 1 fails")


def test_after_pushes_that_broke_off_two_versions_are_there_and_no_name_comes_twice(folder: Path) -> None:
    """The one that engines have, for those that did not fail, and the one that they are to have."""
    for left in ("version-4", "version-9", "version-9.2"):  # by an earlier life of the run
        (folder / left).mkdir(parents=True)
    failing = Failing("engine 1")
    with small_files(folder, Reader("engine 0"), failing) as publisher:
        publisher.push(WEIGHTS.items(), version=5)
        failing.failures = 2
        for _ in range(2):
            with pytest.raises(EngineError, match="engine 1 fails"):
                publisher.push(WEIGHTS.items(), version=6)
        publisher.push(WEIGHTS.items(), version=6)
    assert failing.seen == [
        ["version-5", "version-9.2"],
        ["version-5", "version-6"],
        ["version-5", "version-6.2"],
        ["version-5", "version-6.3"],
    ]
    assert [path.name for path in folder.iterdir()] == ["version-6.3"]


class Unlucky(Reader):
    def before_reading(self, folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        self.hurt(file, tensors)

    def hurt(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors["w5"][0, 0] += 1
        save_file(tensors, file, {"format": "pt"})


class Incomplete(Unlucky):
    def hurt(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file({name: tensor for name, tensor in tensors.items() if name != "w5"}, file, {"format": "pt"})


class Torn(Unlucky):
    def hurt(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        file.write_bytes(file.read_bytes()[:-7])


class Elsewhere(Reader):
    def before_reading(self, folder: Path) -> None:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("reader", "says"),
    [
        (Unlucky, "engine 1, w5 has arrived with other bytes than were sent"),
        (Incomplete, "engine 1, a push has left out w5; the model has 5 tensors"),
        (Torn, "engine 1, cannot read .*version-1: "),
        (
            Elsewhere,
            "engine 1, .*version-1 is not there on this machine, 0.1 s after .* that all machines share",
        ),
    ],
)
def test_what_an_engine_reads_is_what_was_written(
    folder: Path, reader: type[Reader], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_VISIBLE_SECONDS", 0.1)
    unlucky = reader("engine 1")
    with open_disk(folder, Reader("engine 0"), unlucky) as publisher, pytest.raises(EngineError, match=says):
        publisher.push(WEIGHTS.items(), version=1)
    assert not unlucky.held


def test_another_rank_only_gathers(folder: Path) -> None:
    said = iter(["bucket", "bucket", "bucket", "bucket", "end"])
    taken: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            taken.append(name)
            yield name, tensor

    other = DiskPublisher(None, None, folder, 32, leader_says=lambda _, value: next(said))
    assert other.push(weights(), version=1) == {}
    assert taken == list(WEIGHTS) and list(said) == [] and not folder.exists()
