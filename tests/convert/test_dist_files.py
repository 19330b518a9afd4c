from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.convert.dist_files import CheckpointError, DistReader, check, peek_common, read_metadata
from dapo_megatron.convert.dist_writer import DistWriter

KEY = "decoder.layers.mlp.linear_fc2.weight"


def write(folder: Path) -> torch.Tensor:
    """Writes a tensor in four chunks by two ranks, and an object. Returns the tensor."""
    folder.mkdir()
    whole = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    with DistWriter(folder, {"iteration": 12}) as writer:
        for layer in range(2):
            for rank in range(2):
                cut = whole[layer : layer + 1, 2 * rank : 2 * rank + 2]
                writer.add(rank, KEY, (2, 4, 3), (layer, 2 * rank, 0), cut)
        writer.add_object(1, "state/shard_0_1", {"step": 3})
    return whole


def test_what_was_written_is_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "a")
    reader = check(tmp_path / "a")
    assert torch.equal(reader.read(KEY), whole)
    assert torch.equal(reader.read(KEY, (1,)), whole[1])
    assert reader.read_object("state/shard_0_1") == [{"step": 3}]
    assert peek_common(tmp_path / "a") == {"iteration": 12}


def test_torch_reads_it_too(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    whole = write(tmp_path / "a")
    state = {KEY: torch.zeros(2, 4, 3)}
    load(state, storage_reader=FileSystemReader(tmp_path / "a"), no_dist=True)
    assert torch.equal(state[KEY], whole)


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("place", ["instead", "planner_data", "storage_data"])
def test_a_hostile_index_is_refused_by_name_and_not_run(place: str, tmp_path: Path) -> None:
    write(tmp_path / "a")
    file, trace = tmp_path / "a/.metadata", tmp_path / "trace"
    metadata = read_metadata(tmp_path / "a")
    if place != "instead":
        setattr(metadata, place, Hostile(trace))
    file.write_bytes(pickle.dumps(Hostile(trace) if place == "instead" else metadata))
    with pytest.raises(CheckpointError, match=r"a/\.metadata is not read: it asks for posix\.mkdir"):
        check(tmp_path / "a")
    assert not trace.exists()
    with file.open("rb") as opened:
        pickle.load(opened)
    assert trace.exists()  # it would have


def test_a_hostile_object_and_a_hostile_common_file_are_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "a").mkdir()
    with DistWriter(tmp_path / "a", {"args": Hostile(trace), "iteration": 5}) as writer:
        writer.add_object(0, "rng_state/shard_0_1", Hostile(trace))
    assert peek_common(tmp_path / "a")["iteration"] == 5
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: rng_state/shard_0_1 is damaged"):
        check(tmp_path / "a")
    assert not trace.exists()


def test_places_outside_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    metadata = read_metadata(tmp_path / "a")
    for place in metadata.storage_data.values():
        place.relative_path = "../a/" + place.relative_path
    (tmp_path / "a/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names a file outside the folder, '\.\./a/__0_0\.distcp'"):
        DistReader(tmp_path / "a")


@pytest.mark.parametrize("name", [b"relative_path", b"chunks", b"properties", b"sizes", b"offset", b"fqn"])
def test_an_index_with_a_flipped_bit_is_called_damaged(name: bytes, tmp_path: Path) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a/.metadata"
    held = file.read_bytes()
    assert name in held
    file.write_bytes(held.replace(name, name[:-1] + bytes([name[-1] ^ 1])))
    with pytest.raises(CheckpointError, match=r"a/\.metadata is damaged and cannot be read \("):
        read_metadata(tmp_path / "a")


def test_a_file_that_is_cut_short_or_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a/__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(
        CheckpointError, match=rf"__1_0\.distcp is cut short: it has {size - 1:,} bytes, .* to {size:,}"
    ):
        DistReader(tmp_path / "a")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is missing"):
        DistReader(tmp_path / "a")
    (tmp_path / "a/.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing; the checkpoint is incomplete"):
        DistReader(tmp_path / "a")


def test_every_flipped_byte_of_a_weight_is_seen(tmp_path: Path) -> None:
    """torch.load does not look at the checksums that torch.save writes."""
    whole = write(tmp_path / "a")
    file = tmp_path / "a/__0_0.distcp"
    data = file.read_bytes()
    begin = data.index(whole[0, :2].numpy().tobytes())
    for at in range(begin, begin + 24):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=rf"__0_0\.distcp: {KEY} is damaged: .* checksum"):
            DistReader(tmp_path / "a").read(KEY)


def test_a_flipped_byte_anywhere_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    whole = write(tmp_path / "a")
    file = tmp_path / "a/__0_0.distcp"
    data = file.read_bytes()
    for at in range(0, len(data), 7):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            got = DistReader(tmp_path / "a").read(KEY)
        except CheckpointError as error:
            assert "__0_0.distcp" in str(error)
        else:
            assert torch.equal(got, whole)


def test_a_chunk_that_is_not_what_the_index_says(tmp_path: Path) -> None:
    write(tmp_path / "a")
    metadata = read_metadata(tmp_path / "a")
    (lost, *_) = metadata.state_dict_metadata[KEY].chunks  # type: ignore[union-attr]
    metadata.state_dict_metadata[KEY].chunks.remove(lost)  # type: ignore[union-attr]
    (tmp_path / "a/.metadata").write_bytes(pickle.dumps(metadata))
    reader = DistReader(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"the chunks of .* hold 6 of the 12 numbers wanted"):
        reader.read(KEY, (0,))
    assert reader.read(KEY, (1,)).shape == (4, 3)


def test_an_interrupted_writer_leaves_no_index(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt), DistWriter(tmp_path / "a", {}) as writer:
        writer.add(0, KEY, (1,), (0,), torch.zeros(1))
        raise KeyboardInterrupt
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["__0_0.distcp"]


def test_views_are_saved_without_the_rest_of_their_memory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with DistWriter(tmp_path / "a", {}) as writer:
        writer.add(0, KEY, (1, 4), (0, 0), torch.zeros(1_000_000).view(-1, 4)[5:6])
    assert (tmp_path / "a/__0_0.distcp").stat().st_size < 4000
    assert zipfile.is_zipfile(tmp_path / "a/common.pt")


def test_a_chunk_may_hold_several_layers(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(3, 2, 4)
    (tmp_path / "a").mkdir()
    with DistWriter(tmp_path / "a", {}) as writer:
        writer.add(0, KEY, (3, 2, 4), (0, 0, 0), whole[:2])
        writer.add(1, KEY, (3, 2, 4), (2, 0, 0), whole[2:])
    reader = DistReader(tmp_path / "a")
    for layer in range(3):
        assert torch.equal(reader.read(KEY, (layer,)), whole[layer])
        assert torch.equal(reader.read(KEY, (layer, 1)), whole[layer, 1])
