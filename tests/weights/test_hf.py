from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_megatron.check_reduction.reference import as_in_files
from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.weights.shards import write_tensors
from dapo_megatron.weights.verify import Tally
from tests.helpers.distributed import run_distributed
from tests.helpers.models import FAMILIES, load_reference, make_config, save_qwen2, save_tiny


def round_trip(
    path: Path, names: Sequence[str], dtype: str, parallel: dict[str, Any], saved: Path
) -> dict[str, Tensor]:
    """Load one checkpoint after the other, see that what is exported is what was to be, and save them.

    Returns what was exported, on the last rank.
    """
    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(**parallel))
    tensors: dict[str, Tensor] = {}
    for name in names:
        for key, tensor in _load_and_save(path / name, dtype, parallel, saved / name):
            assert f"{name}:{key}" not in tensors
            tensors[f"{name}:{key}"] = tensor
    topology.shutdown()
    return tensors if topo.rank == topo.world_size - 1 else {}


def _load_and_save(path: Path, dtype: str, parallel: dict[str, Any], saved: Path) -> Iterator[tuple[str, Tensor]]:
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.topology import process_groups
    from dapo_megatron.hf_folder import read_hf_config
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(path, model={"dtype": dtype}, parallel=parallel)
    hf_config = read_hf_config(path)
    settings = transformer_config(hf_config, config.model, config.parallel, config.memory)
    chunks = build_chunks(hf_config, config.model, settings, process_groups())
    checkpoint = HfCheckpoint(path)
    checkpoint.load(chunks)
    checkpoint.save(chunks, saved)
    assert (checkpoint.inventory is not None) == (torch.distributed.get_rank() == 0)
    tally = Tally(checkpoint.inventory) if checkpoint.inventory else None
    for name, tensor in checkpoint.export(chunks):
        if tally:
            tally.count(tally.find([(name, tensor)]))
        yield name, tensor.clone()
    if tally:
        tally.end()


# The tied model first: mbridge must not keep its mapping for the untied one.
TRIPS = [f"{family}-{tied}" for family in FAMILIES for tied in ("tied", "untied")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of float32 numbers that bfloat16 does not hold. Tensor parallel does not divide their 50 tokens."""
    folder = tmp_path_factory.mktemp("originals")
    for name in TRIPS:
        family, tied = name.split("-")
        save_tiny(folder / name, family, tied=tied == "tied", layers=4)
    return folder


@pytest.mark.multiproc
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        ({}, 1),
        ({"tp": 2}, 2),
        ({"tp": 4}, 4),  # more ranks than heads of keys
        pytest.param({"pp": 2}, 2, marks=pytest.mark.long),
        ({"pp": 2, "vpp": 2}, 2),
        pytest.param({"tp": 2, "pp": 2}, 4, marks=pytest.mark.long),
        ({"tp": 2, "pp": 2, "vpp": 2}, 4),
    ],
    ids=lambda value: "x".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else "",
)
def test_round_trip_is_bit_exact(
    originals: Path, parallel: dict[str, int], ranks: int, dtype: str, tmp_path: Path
) -> None:
    """Of every family."""
    exported = run_distributed(round_trip, ranks, originals, TRIPS, dtype, parallel, tmp_path)[-1]
    for name in TRIPS:
        want = as_in_files(load_reference(originals / name, getattr(torch, dtype)).state_dict())
        again = as_in_files(load_reference(tmp_path / name, "auto").state_dict())  # type: ignore[arg-type]
        assert set(again) == set(want)
        assert all(torch.equal(again[key], want[key]) for key in want)
        keys = {key.removeprefix(f"{name}:") for key in exported if key.startswith(f"{name}:")}
        assert keys == set(want) - ({"lm_head.weight"} if name.endswith("-tied") else set())
        assert all(torch.equal(exported[f"{name}:{key}"], want[key]) for key in keys)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("parallel", "ranks"), [({"ep": 2}, 2), ({"ep": 2}, 4), ({"tp": 2, "ep": 2}, 4), ({"pp": 2, "ep": 2}, 4)], ids=str
)
def test_so_is_that_of_experts_that_ranks_share_out(
    originals: Path, parallel: dict[str, int], ranks: int, tmp_path: Path
) -> None:
    names = [name for name in TRIPS if "moe" in name]
    for exported in run_distributed(round_trip, ranks, originals, names, "float32", parallel, tmp_path):
        for name in names:
            want = as_in_files(load_reference(originals / name, torch.float32).state_dict())
            assert all(
                torch.equal(exported[key], want[key.removeprefix(f"{name}:")]) for key in exported if name in key
            )
            again = as_in_files(load_reference(tmp_path / name, torch.float32).state_dict())
            assert set(again) == set(want)
            assert all(torch.equal(again[key], want[key]) for key in want)


def build(path: Path) -> tuple[Any, Any]:
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.topology import process_groups
    from dapo_megatron.hf_folder import read_hf_config
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(path)
    hf_config = read_hf_config(path)
    settings = transformer_config(hf_config, config.model, config.parallel, config.memory)
    return HfCheckpoint(path), build_chunks(hf_config, config.model, settings, process_groups())


@pytest.mark.usefixtures("alone")
def test_missing_and_unexpected_tensors_are_errors(tmp_path: Path) -> None:
    save_qwen2(tmp_path, tied=False)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    checkpoint, chunks = build(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors, such as lm_head\.weight"):
        checkpoint.load(chunks)
    save_file({**tensors, "model.layers.2.extra": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"has no place in the model for 1 tensors, such as model\.layers\.2\.extra"):
        checkpoint.load(chunks)


@pytest.mark.usefixtures("alone")
def test_experts_in_one_tensor_are_told_how_to_come_apart(tmp_path: Path) -> None:
    apart = save_tiny(tmp_path / "apart", "qwen3_moe")
    load_reference(apart, torch.float32).save_pretrained(tmp_path / "fused", save_original_format=False)
    checkpoint, chunks = build(tmp_path / "fused")
    with pytest.raises(ConfigError, match=r"lacks 48 tensors.*gives each expert its own tensors"):
        checkpoint.load(chunks)


@pytest.mark.usefixtures("alone")
def test_large_models_are_saved_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.weights import hf

    monkeypatch.setattr(hf, "_SHARD_BYTES", 8000)
    checkpoint, chunks = build(save_qwen2(tmp_path / "a"))
    checkpoint.load(chunks)
    checkpoint.save(chunks, tmp_path / "b")
    shards = sorted(file.name for file in (tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    want = load_reference(tmp_path / "a").state_dict()
    got = load_reference(tmp_path / "b").state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_whoever_may_read_other_files_may_read_weights(tmp_path: Path) -> None:
    write_tensors([[("a", torch.zeros(3))]], tmp_path)
    (tmp_path / "other").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["other"] and len(modes) == 2


@pytest.mark.usefixtures("alone")
def test_export_leaves_gradients_on_for_its_reader(tmp_path: Path) -> None:
    checkpoint, chunks = build(save_qwen2(tmp_path))
    checkpoint.load(chunks)
    for _, tensor in checkpoint.export(chunks):
        assert torch.is_grad_enabled()
        assert not tensor.requires_grad


@pytest.mark.usefixtures("alone")
def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    from dapo_megatron.weights.hf import HfCheckpoint

    with pytest.raises(ConfigError, match=r"has no config\.json"):
        HfCheckpoint(tmp_path)


@pytest.mark.usefixtures("alone")
def test_a_model_that_cannot_be_written_is_an_error_with_its_place(tmp_path: Path) -> None:
    save_qwen2(tmp_path / "model")
    checkpoint, chunks = build(tmp_path / "model")
    (tmp_path / "taken").touch()
    with pytest.raises(DapoError, match=r"cannot save the model in .*taken/hf: .*Not a directory"):
        checkpoint.save(chunks, tmp_path / "taken/hf")


@pytest.mark.usefixtures("alone")
def test_a_model_that_is_half_written_does_not_have_the_name_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dapo_megatron.weights import hf

    checkpoint, chunks = build(save_qwen2(tmp_path / "model"))
    kept, folder = tmp_path / "saved/hf/of_an_older_one", tmp_path / "saved/hf"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for error in (OSError(28, "No space left on device"), SystemExit(75)):  # the second leaves it where it was
        with monkeypatch.context() as patch, pytest.raises((DapoError, SystemExit)):
            patch.setattr(hf, "_write_config", Mock(side_effect=error))
            checkpoint.save(chunks, folder)
        assert list(folder.iterdir()) == [kept]
    checkpoint.save(chunks, folder)
    assert (folder / "model.safetensors").is_file() and not kept.exists()
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.usefixtures("alone")
def test_a_model_has_its_name_once_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_megatron.weights import hf

    monkeypatch.setattr(hf, "_SHARD_BYTES", 8000)
    checkpoint, chunks = build(save_qwen2(tmp_path / "model"))
    folder, unfinished = tmp_path / "saved/hf", tmp_path / "saved/.hf.unfinished"
    synced: dict[str, int] = {}
    """Path, as it was called then -> bytes that it had."""

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert folder.exists() == (path == folder.parent), f"{path} before or after the name"
        synced[str(path)] = path.stat().st_size if path.is_file() else 0

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(chunks, folder)
    files = {str(unfinished / path.name): path.stat().st_size for path in folder.iterdir()}
    assert len(files) > 4
    assert synced == {**files, str(unfinished): 0, str(folder.parent): 0}
    assert list(synced)[-2:] == [str(unfinished), str(folder.parent)]
