"""Against real Megatron: what its ranks save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dapo_megatron.convert.dist_files import DistReader, check
from tests.helpers.conversion import (
    assert_same_tensors,
    load_by_megatron,
    save_by_megatron,
    tensors,
    to_hf,
    to_megatron,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.models import save_tiny

FAMILIES = ("qwen2",)


def form(reader: DistReader) -> dict[str, Any]:
    """What is in a checkpoint: for tensors dtype, size, and which rank has which chunk."""
    places = {(index.fqn, index.offset): place for index, place in reader.metadata.storage_data.items()}
    found: dict[str, Any] = {}
    for key, value in reader.metadata.state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            ranks = {
                (tuple(chunk.offsets), tuple(chunk.sizes)): places[key, chunk.offsets].relative_path.split("_")[2]
                for chunk in value.chunks
            }
            assert len(ranks) == len(value.chunks)
            found[key] = (value.properties, value.size, ranks)
        else:
            found[key] = places[key, None].relative_path.split("_")[2]
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}], ids=["tp1", "tp2", "tp2pp2", "pp2vpp2"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_is_what_megatron_saves(family: str, parallel: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", family, tied=tied, layers=4, dtype=torch.bfloat16)
    (tmp_path / "saved").mkdir()
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1)
    run_distributed(save_by_megatron, ranks, source, tmp_path / "saved", parallel, "bfloat16")
    to_megatron(source, tmp_path / "converted", **parallel)
    saved, converted = check(tmp_path / "saved"), check(tmp_path / "converted")
    want, got = form(saved), form(converted)
    # What Transformer Engine's norms look for besides.
    assert {key.split("/")[0].split(".", 2)[-1] for key in set(got) - set(want)} <= {
        "_extra_state",
        "self_attention.q_layernorm._extra_state",
        "self_attention.k_layernorm._extra_state",
    }
    assert {key: got[key] for key in want} == want
    for key in saved.tensors:
        assert torch.equal(saved.read(key), converted.read(key)), key
    for key in saved.objects:
        assert converted.read_object(key) == saved.read_object(key)
    to_hf(tmp_path / "saved", tmp_path / "back", hf=source)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.multiproc
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_loads_a_conversion_in_other_layouts(family: str, tied: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", family, tied=tied, layers=4)
    to_megatron(source, tmp_path / "converted", tp=2, pp=2, vpp=2)
    # Rows that pad the vocabulary are 64 in both: where they differ in number, Megatron fills up.
    for parallel, ranks in (({}, 1), ({"tp": 2}, 2), ({"pp": 2}, 2), ({"pp": 2, "vpp": 2}, 2), ({"tp": 2, "pp": 2}, 4)):
        counts = run_distributed(load_by_megatron, ranks, source, tmp_path / "converted", parallel, "float32")
        assert all(counts)
