"""Who reads a checkpoint, and how the others come by it: real ranks over gloo."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_megatron.config import ParallelConfig
from dapo_megatron.errors import ConfigError
from tests.helpers.distributed import run_distributed
from tests.helpers.models import load_reference, make_config, save_qwen2

Seen = tuple[set[str], dict[str, Tensor], dict[str, Tensor]]
SLOW_SECONDS = 5.0


def load(
    path: Path, parallel: dict[str, Any], together: Callable[[str], object] = lambda what: None, seconds: float = 120.0
) -> Seen:
    """Loads a checkpoint into parameters that are nan.

    Returns the tensors that this rank has read from files, its parameters, and what it exports.
    """
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.topology import process_groups
    from dapo_megatron.weights import hf, read

    topology.initialize(ParallelConfig(**parallel), timeout=timedelta(seconds=seconds))
    config = make_config(path, model={"dtype": "bfloat16"}, parallel=parallel)
    checkpoint = hf.HfCheckpoint(path)
    settings = transformer_config(checkpoint.hf_config, config.model, config.parallel, config.memory)
    chunks = build_chunks(checkpoint.hf_config, config.model, settings, process_groups())
    for chunk in chunks:
        for param in chunk.parameters():
            param.data.fill_(torch.nan)
    read_here: set[str] = set()

    class Counting:
        def __init__(self, file: Path, **options: Any) -> None:
            read_here.add(file.name)
            self._open = safe_open(file, **options)

        def __enter__(self) -> Counting:
            self._file = self._open.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._open.__exit__(*error)

        def keys(self) -> Any:
            return self._file.keys()

        def get_tensor(self, name: str) -> Tensor:
            read_here.add(name)
            return self._file.get_tensor(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.safe_open", Counting)
        patch.setattr(read, "safe_open", Counting)
        patch.setattr(read, "_BUCKET_BYTES", 3000)  # more than most tensors, less than some
        checkpoint.load(chunks, together)
    mine = {f"{stage}:{name}": x.detach() for stage, c in enumerate(chunks) for name, x in c.named_parameters()}
    whole = {name: tensor.clone() for name, tensor in checkpoint.export(chunks)}
    topology.shutdown()
    return read_here, mine, whole


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("parallel", "ranks", "readers"),
    [
        # Ranks count tensor parallel fastest, then context, data, and pipeline parallel.
        ({"tp": 2}, 4, [0, 1]),
        ({"pp": 2, "vpp": 2}, 4, [0, 2]),
        ({"cp": 2}, 4, [0]),
    ],
    ids=["dp2xtp2", "dp2xpp2+vpp2", "dp2xcp2"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_one_replica_reads_and_the_others_get_the_same_bits(
    parallel: dict[str, int], ranks: int, readers: list[int], tied: bool, tmp_path: Path
) -> None:
    save_qwen2(tmp_path, tied=tied, layers=4)
    found: list[Seen] = run_distributed(load, ranks, tmp_path, parallel)
    assert [rank for rank, (read_here, _, _) in enumerate(found) if read_here] == readers
    want = load_reference(tmp_path, torch.bfloat16).state_dict()
    for _, _, whole in found:
        assert set(whole) == set(want) - ({"lm_head.weight"} if tied else set())
        assert all(torch.equal(whole[name], want[name]) for name in whole)
    # What is padded as well, which is not exported.
    stage = 2 if "pp" in parallel else ranks
    for rank, (_, mine, _) in enumerate(found):
        first = readers[rank // stage] + (rank % 2 if "tp" in parallel else 0)
        assert all(torch.equal(mine[name], found[first][1][name]) for name in mine)
    if "pp" in parallel:
        first, last = (found[rank][0] for rank in readers)
        # A tied output layer is on the last stage too.
        assert ("model.embed_tokens.weight" in first, "model.embed_tokens.weight" in last) == (True, tied)
        assert ("lm_head.weight" in first, "lm_head.weight" in last) == (False, not tied)
        # Chunks 0 and 2 are on the first.
        numbers = {int(number) for name in first for number in re.findall(r"layers\.(\d)", name)}
        assert numbers == {0, 2}


class Slow:
    """Waits for all ranks by files, as `peers.together` does by connections; one rank comes late."""

    def __init__(self, folder: Path, late: int) -> None:
        self._folder, self._late = folder, late

    def __call__(self, what: str) -> None:
        import torch.distributed as dist

        if dist.get_rank() == self._late:
            time.sleep(SLOW_SECONDS)
        (self._folder / f"{what} {dist.get_rank()}").touch()
        while len(list(self._folder.glob(f"{what} *"))) < dist.get_world_size():
            time.sleep(0.05)


@pytest.mark.multiproc
@pytest.mark.parametrize("late", [0, 1])
def test_reading_may_take_longer_than_a_collective(late: int, tmp_path: Path) -> None:
    """Ranks 0 and 1 read, 2 and 3 wait for them."""
    save_qwen2(tmp_path / "model")
    (tmp_path / "board").mkdir()
    together = Slow(tmp_path / "board", late)
    found = run_distributed(load, 4, tmp_path / "model", {"tp": 2}, together, SLOW_SECONDS - 3)
    assert all(not tensor.isnan().any() for _, mine, _ in found for tensor in mine.values())


def test_weights_of_other_shapes_are_refused(alone: Any, tmp_path: Path) -> None:
    from dapo_megatron.actor.model import build_chunks, transformer_config
    from dapo_megatron.actor.topology import process_groups
    from dapo_megatron.weights.hf import HfCheckpoint

    save_qwen2(tmp_path)
    config = make_config(tmp_path)
    checkpoint = HfCheckpoint(tmp_path)
    settings = transformer_config(checkpoint.hf_config, config.model, config.parallel, config.memory)
    chunks = build_chunks(checkpoint.hf_config, config.model, settings, process_groups())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.0."
    for name, shape, message in (
        (f"{layer}self_attn.k_proj.weight", (8, 32), r"self_attn.k_proj.weight \[8, 32\]"),
        (f"{layer}mlp.down_proj.weight", (32, 40), r"mlp.down_proj.weight \[32, 40\]"),
        (f"{layer}input_layernorm.weight", (1,), r"input_layernorm.weight \[1\]"),
        ("model.embed_tokens.weight", (49, 32), "embed_tokens.weight has 49 rows, but vocab_size is 50"),
    ):
        save_file({**tensors, name: torch.zeros(shape)}, file, {"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            checkpoint.load(chunks)


def test_weights_for_other_programs_in_the_same_folder_are_left_alone(tmp_path: Path) -> None:
    from dapo_megatron.hf_folder import tensor_files

    save_qwen2(tmp_path)
    names = set(tensor_files(tmp_path))
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert set(tensor_files(tmp_path)) == names
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = '{"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert set(tensor_files(tmp_path)) == names
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="cannot read the weights in"):
        tensor_files(tmp_path)
