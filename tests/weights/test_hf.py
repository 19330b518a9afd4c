from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError, DapoError
from tests.helpers.distributed import run_distributed
from tests.helpers.models import load_reference, make_config, save_qwen2


def round_trip(path: Path, parallel: dict[str, Any], saved: Path) -> dict[str, Tensor]:
    """Load a tied and an untied checkpoint one after the other, as bfloat16, and save both.

    Returns what was exported, on the last rank.
    """
    from dapo_megatron.actor import topology

    topo = topology.initialize(ParallelConfig(**parallel))
    tensors: dict[str, Tensor] = {}
    for name in ("tied", "untied"):
        for key, tensor in _load_and_save(path / name, parallel, saved / name):
            assert f"{name}:{key}" not in tensors
            tensors[f"{name}:{key}"] = tensor
    topology.shutdown()
    return tensors if topo.rank == topo.world_size - 1 else {}


def _load_and_save(path: Path, parallel: dict[str, Any], saved: Path) -> Iterator[tuple[str, Tensor]]:
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.topology import process_groups
    from dapo_megatron.hf_folder import read_hf_config
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(path, model={"dtype": "bfloat16"}, parallel=parallel)
    hf_config = read_hf_config(path)
    settings = transformer_config(hf_config, config.model, config.parallel, config.memory)
    chunks = build_chunks(hf_config, config.model, settings, process_groups())
    checkpoint = HfCheckpoint(path)
    checkpoint.load(chunks)
    checkpoint.save(chunks, saved)
    for name, tensor in checkpoint.export(chunks):
        yield name, tensor.clone()


@pytest.mark.multiproc
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}], ids=["one", "tp2", "pp2"])
def test_round_trip_is_bit_exact(parallel: dict[str, int], tmp_path: Path) -> None:
    """The tied model first: mbridge must not keep its mapping for the untied one."""
    for name in ("tied", "untied"):
        save_qwen2(tmp_path / name, tied=name == "tied")
    ranks = run_distributed(round_trip, 2 if parallel else 1, tmp_path, parallel, tmp_path / "saved")
    for name in ("tied", "untied"):
        want = load_reference(tmp_path / name, torch.bfloat16).state_dict()
        again = load_reference(tmp_path / "saved" / name, "auto").state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(again[key], want[key]) for key in want)
        exported = {key.removeprefix(f"{name}:") for key in ranks[-1] if key.startswith(f"{name}:")}
        assert exported == set(want) - ({"lm_head.weight"} if name == "tied" else set())
        assert all(torch.equal(ranks[-1][f"{name}:{key}"], want[key]) for key in exported)


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
