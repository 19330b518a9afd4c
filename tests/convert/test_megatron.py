"""Against real Megatron: what its ranks save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dapo_megatron.convert.describe import describe
from dapo_megatron.convert.dist_files import DistReader, check
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss
from tests.helpers.conversion import (
    assert_same_tensors,
    load_by_megatron,
    save_by_megatron,
    tensors,
    to_hf,
    to_megatron,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.models import FAMILIES, make_config, save_tiny


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


LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "tp4": {"tp": 4}, "tp2pp2": {"tp": 2, "pp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}}
OF_EXPERTS = {"tp2ep2": {"tp": 2, "ep": 2}, "ep4": {"ep": 4}}
DAILY = [
    ("qwen2", "tp1", True),
    ("qwen2", "tp2pp2", False),
    ("qwen2", "pp2vpp2", True),
    ("qwen3", "tp4", True),
    ("qwen3_moe", "tp2ep2", True),
]
CASES = [
    *(("qwen2", layout, tied) for layout in LAYOUTS for tied in (True, False)),
    *((family, "tp2pp2", False) for family in FAMILIES if family != "qwen2"),
    ("qwen3", "tp4", True),
    ("qwen3_moe", "tp2ep2", True),
    ("qwen3_moe", "ep4", False),
]


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("family", "layout", "tied"),
    [pytest.param(*case, marks=[] if case in DAILY else pytest.mark.long) for case in CASES],
)
def test_a_conversion_is_what_megatron_saves(family: str, layout: str, tied: bool, tmp_path: Path) -> None:
    parallel: dict[str, Any] = (LAYOUTS | OF_EXPERTS)[layout]
    source = save_tiny(tmp_path / "hf", family, tied=tied, layers=4, dtype=torch.bfloat16)
    (tmp_path / "saved").mkdir()
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("ep", 1)
    run_distributed(save_by_megatron, ranks, source, tmp_path / "saved", parallel, "bfloat16")
    to_megatron(source, tmp_path / "converted", **parallel)
    saved, converted = check(tmp_path / "saved"), check(tmp_path / "converted")
    want, got = form(saved), form(converted)
    # What Transformer Engine's norms look for besides.
    assert {key.split("/")[0].split(".", 2)[-1] for key in set(got) - set(want)} <= {
        "_extra_state",
        "self_attention.q_layernorm._extra_state",
        "self_attention.k_layernorm._extra_state",
        "pre_mlp_layernorm._extra_state",
    }
    assert {key: got[key] for key in want} == want
    for key in saved.tensors:
        assert torch.equal(saved.read(key), converted.read(key)), key
    for key in saved.objects:
        assert converted.read_object(key) == saved.read_object(key)
    to_hf(tmp_path / "saved", tmp_path / "back", hf=source)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.multiproc
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", False), ("llama3", True)])
def test_megatron_loads_a_conversion_in_other_layouts(family: str, tied: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", family, tied=tied, layers=4)
    to_megatron(source, tmp_path / "converted", tp=2, pp=2, vpp=2)
    # Rows that pad the vocabulary are 64 in both: where they differ in number, Megatron fills up.
    for parallel, ranks in (({}, 1), ({"tp": 2}, 2), ({"pp": 2}, 2), ({"pp": 2, "vpp": 2}, 2), ({"tp": 2, "pp": 2}, 4)):
        counts = run_distributed(load_by_megatron, ranks, source, tmp_path / "converted", parallel, "float32")
        assert all(counts)


@pytest.mark.multiproc
def test_megatron_loads_experts_in_other_layouts(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False, layers=4)
    to_megatron(source, tmp_path / "converted", tp=2, pp=2, ep=2)
    for parallel, ranks in (({"ep": 2}, 2), ({"tp": 2}, 2), ({"tp": 2, "ep": 2}, 4), ({"ep": 2}, 4)):
        counts = run_distributed(load_by_megatron, ranks, source, tmp_path / "converted", parallel, "float32")
        assert all(counts)


def save_run(model: Path, folder: Path, parallel: dict[str, Any], dtype: str) -> dict[str, Tensor]:
    """Called on ranks: a run's checkpoint, with the optimizer's state, after a step. Returns the weights."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.checkpoint.checkpoints import Checkpoints
    from dapo_megatron.state import RunState
    from dapo_megatron.weights.hf import HfCheckpoint

    run = {"dir": str(folder), "name": "run"}
    config = make_config(model, parallel=parallel, model={"dtype": dtype}, run=run, optimizer={"lr": 1e-2})
    topo = topology.initialize(config.parallel)
    hf = HfCheckpoint(model)
    actor = Actor(config, topo, hf)
    micro_batches = [make_micro_batch([12, 8], seed=topo.dp_rank, multiple=4)] * 2
    tokens = topo.dp * sum(batch.loss_tokens for batch in micro_batches)
    batches, _ = actor.with_old_logprobs([make_mini_batch(micro_batches, tokens)])
    actor.update(batches[0], ratio_loss, lr=1e-2)
    checkpoints = Checkpoints(config, topo, actor, hf, RunState({} if topo.is_leader else None), tell=print)
    checkpoints.save(5)
    checkpoints.finish()
    weights = {name: tensor.clone() for name, tensor in hf.export(actor.chunks)}
    topology.shutdown()
    return weights


@pytest.mark.multiproc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["tp2", "pp2vpp2"])
def test_a_runs_checkpoint_converts(layout: str, dtype: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", layers=4)
    weights, _ = run_distributed(save_run, 2, source, tmp_path, LAYOUTS[layout], dtype)
    to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), weights)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == dtype
    found = describe(tmp_path / "run")
    assert (found["step"], found["parameters"], found["missing"]) == (5, 32_864, [])
    assert found["optimizer_and_other_state"]["parameters"] >= 2 * found["parameters"]


@pytest.mark.multiproc
def test_so_does_that_of_a_run_whose_ranks_share_out_experts(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", "qwen3_moe")
    weights, _ = run_distributed(save_run, 2, source, tmp_path, {"ep": 2}, "bfloat16")
    to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), weights)
    assert not all(torch.equal(weights[name], tensor) for name, tensor in tensors(source).items())
    found = describe(tmp_path / "run")
    assert (found["parameters"], found["missing"]) == (sum(tensor.numel() for tensor in weights.values()), [])
    # Main parameters and two moments of all experts, each once.
    assert found["optimizer_and_other_state"]["parameters"] >= 3 * found["parameters"]
