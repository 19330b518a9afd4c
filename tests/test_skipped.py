from __future__ import annotations

import resource
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dapo_megatron.skipped import MAX_FILES, save_skipped
from dapo_megatron.types import MicroBatch, MiniBatch


def micro_batch(seed: int, slots: int = 6) -> MicroBatch:
    """With values that do not equal themselves, tensors that share memory, and one field left out."""
    generator = torch.Generator().manual_seed(seed)
    mask_T = torch.rand(slots, generator=generator) < 0.5
    tokens = torch.randint(50, (slots + 1,), generator=generator)
    strange = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
    return MicroBatch(
        tokens_T=tokens[:-1],
        labels_T=tokens[1:],
        positions_T=torch.arange(slots),
        cu_seqlens=torch.tensor([0, 2, slots], dtype=torch.int32),
        scored_T=mask_T,
        loss_mask_T=mask_T,
        advantages_T=torch.randn((), generator=generator).expand(slots),
        weights_T=torch.ones(slots),
        rollout_logprobs_T=strange[:slots],
        groups_S=torch.tensor([seed, -1]),
        old_logprobs_T=torch.randn(2 * slots, generator=generator)[::2],
    )


REPLICAS = [MiniBatch((micro_batch(0), micro_batch(1, 4)), 7), MiniBatch((micro_batch(2), micro_batch(3)), 7)]


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).tolist()


def test_a_mini_batch_is_kept_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "skipped/step000012-update03.safetensors"
    assert save_skipped(tmp_path, 12, 3, "loss", REPLICAS) == path
    wanted = {
        f"rank{rank}.micro_batch{index}.{field.name}": bits(getattr(batch, field.name))
        for rank, mini_batch in enumerate(REPLICAS)
        for index, batch in enumerate(mini_batch.micro_batches)
        for field in fields(MicroBatch)
        if field.name != "ref_logprobs_T"
    }
    assert {name: bits(tensor) for name, tensor in load_file(path).items()} == wanted


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = save_skipped(tmp_path, 12, 3, "gradient: mlp is inf", REPLICAS)
    assert path is not None
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata == {
        "reason": "gradient: mlp is inf",
        "step": "12",
        "update": "3",
        "loss_tokens": "7",
        "ranks": "2",
    }
    assert "rank1.micro_batch0.tokens_T" in names
    assert not any("ref_logprobs_T" in name for name in names)


def test_no_more_than_the_limit_are_kept(tmp_path: Path) -> None:
    saved = [save_skipped(tmp_path, step, 0, "loss", REPLICAS) for step in range(MAX_FILES + 2)]
    assert saved[MAX_FILES:] == [None, None]
    assert sorted((tmp_path / "skipped").iterdir()) == saved[:MAX_FILES]


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = replace(REPLICAS[0].micro_batches[0], rollout_logprobs_T=torch.zeros(2**20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="large"):
            save_skipped(tmp_path, 1, 0, "loss", [MiniBatch((large,), 1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "skipped").iterdir()) == []


def test_what_a_killed_run_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "skipped").mkdir()
    for step in range(MAX_FILES):
        (tmp_path / f"skipped/step{step:06}-update00.unfinished").write_bytes(b"half")
    assert save_skipped(tmp_path, 1, 0, "loss", REPLICAS) is not None
