"""Models of experts: Qwen3-MoE."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.convert import memory, tensors_file
from dapo_megatron.convert.dist_files import DistReader
from dapo_megatron.convert.dist_writer import DistWriter
from dapo_megatron.convert.logits import compare_logits
from dapo_megatron.convert.verify import compare_tensors
from dapo_megatron.errors import ConfigError
from tests.helpers.conversion import assert_same_tensors, tensors, to_hf, to_megatron
from tests.helpers.models import load_reference, save_tiny

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def joined(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a model again with one tensor for all experts of a layer, as transformers does if asked to."""
    load_reference(source, dtype).save_pretrained(target, save_original_format=False)
    return target


@pytest.mark.parametrize("parallel", [{"ep": 4}, {"ep": 2, "tp": 2, "pp": 2}, {"ep": 2, "pp": 2, "vpp": 2}], ids=str)
def test_there_and_back_with_expert_parallel(parallel: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False, layers=4, dtype=torch.bfloat16)
    to_megatron(source, tmp_path / "megatron", **parallel)
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))
    ranks = parallel["ep"] * parallel.get("tp", 1) * parallel.get("pp", 1)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == ranks
    # Whatever the layout, an expert has chunks of its own, so that any other layout reads no more than it wants.
    described = DistReader(tmp_path / "megatron").tensors[FC1]
    assert described.size == (4, 8, 2 * 24, 32)
    assert {tuple(chunk.sizes[:2]) for chunk in described.chunks} == {(1, 1)}


@pytest.mark.parametrize("settings", [{"norm_topk_prob": False}, {"tied": False, "num_experts_per_tok": 8}], ids=str)
def test_logits_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", "qwen3_moe", **settings)
    to_megatron(source, tmp_path / "megatron", tp=2)
    agreed = compare_logits(tmp_path / "megatron", source)
    assert float(agreed.partition("within ")[2].split()[0]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_in_one_tensor_stay_in_one(dtype: torch.dtype, tmp_path: Path) -> None:
    apart = save_tiny(tmp_path / "apart", "qwen3_moe", dtype=dtype)
    source = joined(apart, tmp_path / "hf", dtype)
    want = tensors(source)
    assert want["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 2 * 24, 32)
    to_megatron(source, tmp_path / "megatron", tp=2)
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), want)
    told = compare_tensors(tmp_path / "megatron", tmp_path / "megatron/hf", source, None, io.StringIO())
    assert told == "all 68 tensors are equal by SHA-256"
    # It is the model that it was, and what has a name for each expert is the same model.
    to_megatron(apart, tmp_path / "of-apart", tp=2)
    one, other = DistReader(tmp_path / "megatron"), DistReader(tmp_path / "of-apart")
    assert all(torch.equal(one.read(key), other.read(key)) for key in other.tensors)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_experts_are_read_and_written_one_at_a_time(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"num_experts": 16, "vocab_size": 16}
    source = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False, **sizes)
    source = joined(source, tmp_path / "joined") if together else source
    read: list[int] = []

    def read_exactly(file: Any, target: torch.Tensor) -> None:
        read.append(target.nbytes)
        memory.read_exactly(file, target)

    monkeypatch.setattr(tensors_file, "read_exactly", read_exactly)
    monkeypatch.setattr("dapo_megatron.convert.dist_files.read_exactly", read_exactly)
    to_megatron(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))
    queries, expert = (4 + 2 * 2) * 16 * 32 * 4, 24 * 32 * 4
    assert max(read) == queries < 16 * expert
    assert read.count(expert) >= 2 * 16 * 3


def test_layers_that_have_keys_of_their_own(tmp_path: Path) -> None:
    """As Megatron saves a model whose layers it takes to differ: experts are then the first axis."""
    source = save_tiny(tmp_path / "hf", "qwen3_moe")
    to_megatron(source, tmp_path / "megatron")
    reader = DistReader(tmp_path / "megatron")
    (tmp_path / "apart").mkdir()
    with DistWriter(tmp_path / "apart", {"iteration": 0}) as writer:
        for key in reader.tensors:
            whole = reader.read(key)
            parts = {key: whole}
            if key.startswith("decoder.layers."):
                parts = {key.replace("layers.", f"layers.{layer}."): whole[layer] for layer in range(2)}
            for name, part in parts.items():
                writer.add(0, name, tuple(part.shape), (0,) * part.ndim, part)
    to_hf(tmp_path / "apart", tmp_path / "back", hf=source)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.parametrize(
    ("family", "change", "parallel", "message"),
    [
        (
            "qwen3_moe",
            {"mlp_only_layers": [0]},
            {},
            r"mlp_only_layers is \(0,\) in config\.json; only \(\)",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {}, r"decoder_sparse_step is 2 in config\.json; only 1 is"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, {}, r"num_experts_per_tok is 1 .* of num_experts\(8\); 2 to 8 are"),
        ("qwen3_moe", {}, {"ep": 3}, r"ep\(3\) does not divide the model's num_experts\(8\)"),
        ("qwen3_moe", {"moe_intermediate_size": 25}, {"tp": 2}, r"tp\(2\) .* moe_intermediate_size\(25\)"),
        ("qwen3", {}, {"ep": 2}, r"ep\(2\) shares out experts, and 'qwen3' has none"),
    ],
)
def test_what_does_not_convert_is_refused_by_name(
    family: str, change: dict[str, Any], parallel: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "hf", family, **change)
    with pytest.raises(ConfigError, match=message):
        to_megatron(source, tmp_path / "megatron", **parallel)
    assert not (tmp_path / "megatron").exists()
