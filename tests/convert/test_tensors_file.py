from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.convert.dist_files import CheckpointError
from dapo_megatron.convert.tensors_file import Spec, TensorsFile, TensorsFolder, TensorsWriter

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.arange(5, dtype=torch.float32),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "one": torch.tensor(3, dtype=torch.int64),
}


def test_safetensors_reads_what_is_written_in_any_order(tmp_path: Path) -> None:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with TensorsWriter(tmp_path, specs, 1000) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    got = load_file(tmp_path / "model.safetensors")
    assert set(got) == set(TENSORS)
    assert all(torch.equal(got[name], tensor) for name, tensor in TENSORS.items())
    assert all(got[name].data_ptr() % got[name].itemsize == 0 for name in got)


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = TensorsFile(tmp_path / "x.safetensors")
    assert {name: (spec.dtype, spec.shape) for name, spec in file.specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    assert all(torch.equal(file.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_writer_that_forgot_a_tensor_fails(tmp_path: Path) -> None:
    specs = {"a": Spec(torch.float32, (5,))}
    with pytest.raises(AssertionError, match="not written"), TensorsWriter(tmp_path, specs, 1000):
        pass


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"no whole safetensors file: a header of 0 bytes in a file of 0"),
        (b"\xff" * 20, r"a header of 18,446,744,073,709,551,615 bytes in a file of 20"),
        (b"\x02\0\0\0\0\0\0\0[]", r"no whole safetensors file"),
        (b'\x04\0\0\0\0\0\0\0{"a"', r"no whole safetensors file"),
    ],
)
def test_what_is_no_such_file_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        TensorsFile(tmp_path / "x.safetensors")


def test_a_file_that_is_cut_short_is_named_with_its_sizes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size
    os.truncate(tmp_path / "x.safetensors", size - 3)
    with pytest.raises(CheckpointError, match=rf"cut short: it has {size - 3:,} bytes, and its header wants {size:,}"):
        TensorsFile(tmp_path / "x.safetensors")


def test_a_shape_that_does_not_fit_its_bytes_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"a has 8 bytes, but its shape wants 12"):
        TensorsFile(tmp_path / "x.safetensors")


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"other": TENSORS["b"]}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(TensorsFolder(tmp_path).specs) == {"a"}
    index["weight_map"]["lost"] = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensors in files that do not have them, such as lost in model-0"):
        TensorsFolder(tmp_path)
    index["weight_map"]["lost"] = "model-00002-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00002-of-00002\.safetensors: No such file"):
        TensorsFolder(tmp_path)
    index["weight_map"]["lost"] = "../secret"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names a file outside the folder"):
        TensorsFolder(tmp_path)


def test_without_an_index_model_safetensors_is_the_model(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    save_file({"other": TENSORS["b"]}, tmp_path / "consolidated.safetensors")
    assert set(TensorsFolder(tmp_path).specs) == {"a"}
