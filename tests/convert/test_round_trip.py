from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dapo_megatron.errors import ConfigError
from tests.helpers.conversion import SIDES, add_sides, assert_same_tensors, tensors, to_hf, to_megatron
from tests.helpers.models import FAMILIES, save_tiny

LAYOUTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
    "tp4pp2": {"tp": 4, "pp": 2},
    "pp2vpp2": {"pp": 2, "vpp": 2},
    "tp2pp2vpp2": {"tp": 2, "pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_there_and_back_is_bit_exact(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """With 50 words, which no tensor-parallel size divides, and fewer heads of keys than tp4 has ranks."""
    source = save_tiny(tmp_path / "hf", family, tied=tied, layers=4, dtype=dtype)
    want = tensors(add_sides(source))
    for name, parallel in LAYOUTS.items():
        to_megatron(source, tmp_path / name, **parallel)
        to_hf(tmp_path / name, tmp_path / f"{name}-hf")
        assert_same_tensors(tensors(tmp_path / f"{name}-hf"), want)
        files = sorted((tmp_path / name).glob("*.distcp"))
        assert [file.name for file in files] == [
            f"__{rank}_0.distcp" for rank in range(parallel.get("tp", 1) * parallel.get("pp", 1))
        ]


def test_side_files_travel_byte_for_byte(tmp_path: Path) -> None:
    source = add_sides(save_tiny(tmp_path / "hf", dtype=torch.bfloat16))
    config = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(config := config.replace(b"\n", b"\r\n"))
    (source / "consolidated.pth").write_bytes(b"other weights")
    to_megatron(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    for folder in (tmp_path / "megatron/hf", tmp_path / "back"):
        for name, data in {**SIDES, "config.json": config, "tokenizer_config.json": b"{}\n"}.items():
            assert (folder / name).read_bytes() == data
        assert not (folder / "consolidated.pth").exists()


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_cast_is_torchs_and_config_json_says_so(way: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf")
    to_megatron(source, tmp_path / "megatron", "bfloat16" if way == "there" else None)
    to_hf(tmp_path / "megatron", tmp_path / "back", "bfloat16" if way == "back" else None)
    want = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    assert_same_tensors(tensors(tmp_path / "back"), want)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_weights_of_several_dtypes(tmp_path: Path) -> None:
    """Norms in float32 among bfloat16 are kept. A layer's own dtype has no place where layers are one tensor."""
    source = save_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    want = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors(source).items()}
    save_file(want, source / "model.safetensors", {"format": "pt"})
    to_megatron(source, tmp_path / "megatron", tp=2)
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), want)
    odd = "model.layers.1.self_attn.k_proj.weight"
    save_file({**want, odd: want[odd].float()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{odd} is torch\.float32 and .*q_proj\.weight is torch\.bfloat16.*--dtype"):
        to_megatron(source, tmp_path / "odd")
    to_megatron(source, tmp_path / "cast", "bfloat16")


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from dapo_megatron.convert import to_hf as module

    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    source = save_tiny(tmp_path / "hf", tied=False)
    to_megatron(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    shards = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "back" / shard).stat().st_size < 24_000 for shard in shards)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    want = tensors(source)
    assert set(index["weight_map"]) == set(want)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").state_dict()
    assert_same_tensors({name: loaded[name] for name in want}, want)
    # And from shards.
    to_megatron(tmp_path / "back", tmp_path / "again", tp=2)
    to_hf(tmp_path / "again", tmp_path / "again-hf")
    assert_same_tensors(tensors(tmp_path / "again-hf"), want)


def test_a_tied_models_copy_of_the_embedding_is_left_out_unless_it_differs(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf")
    want = tensors(source)
    copy = want["model.embed_tokens.weight"].clone()
    save_file({**want, "lm_head.weight": copy}, source / "model.safetensors", {"format": "pt"})
    assert "left out lm_head.weight" in to_megatron(source, tmp_path / "megatron")[0]
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tensors(tmp_path / "back"), want)
    copy[3, 4] += 1
    save_file({**want, "lm_head.weight": copy}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the two differ"):
        to_megatron(source, tmp_path / "again")
