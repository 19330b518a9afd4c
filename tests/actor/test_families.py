"""Every family of models against Hugging Face's: log-probs and gradients, alone and in layouts of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.actor.architecture import SUPPORTED
from dapo_megatron.check_reduction.check import check_reduction
from dapo_megatron.check_reduction.reference import as_in_files
from tests.actor.test_actor import BATCHES, build, exported
from tests.helpers.batches import make_mini_batch, ratio_loss, reference_logprobs, worst_relative_error
from tests.helpers.distributed import POOL
from tests.helpers.models import FAMILIES, load_reference, make_config, save_tiny


def test_all_families_are_tested() -> None:
    assert {values["model_type"] for values in FAMILIES.values()} == set(SUPPORTED)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_agrees_with_hugging_face(alone: Any, family: str, tied: bool, tmp_path: Path) -> None:
    """In float32, against float64."""
    save_tiny(tmp_path, family, tied=tied)
    actor, checkpoint = build(tmp_path, alone, optimizer={"clip_grad": 0.0})
    (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(BATCHES)])
    model = load_reference(tmp_path)
    total = torch.zeros((), dtype=torch.float64)
    for batch in mini_batch.micro_batches:
        logprobs_T = reference_logprobs(model, batch, 1.0)
        off = (batch.old_logprobs_T - logprobs_T)[batch.loss_mask_T].abs().max()
        assert off <= 2e-6, off
        total = total + ratio_loss(logprobs_T, batch).loss_sum
    (total / mini_batch.loss_tokens).backward()
    want = as_in_files({name: param.grad for name, param in model.named_parameters()})

    actor.gradient(mini_batch, ratio_loss)
    with actor.gradients_as_weights():
        assert worst_relative_error(exported(actor, checkpoint), want) < 1e-5


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", pytest.param("llama3", marks=pytest.mark.long)])
def test_gradients_do_not_depend_on_the_layout(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2 has check_reduction's own tests. To Megatron, Llama 2 and Mistral are Llama 3 without scaling."""
    save_tiny(tmp_path, family)
    config = make_config(tmp_path)
    layouts = ["tp2xcp2+sp", "dp2xpp2+vpp2+dist-opt+overlap"]
    passed = check_reduction(config, layouts, processes=4, dtype="float32", pool=POOL)
    assert passed, capsys.readouterr().out


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(["dp4+ep2+dist-opt", "tp2xcp2+ep2+sp"], id="some"),
        pytest.param(
            ["1", "tp2xcp2+sp", "dp2xpp2+vpp2+dist-opt+overlap", "dp2+ep2", "dp2xpp2+ep2+dist-opt+overlap"],
            id="more",
            marks=[pytest.mark.long, pytest.mark.timeout(900)],
        ),
    ],
)
def test_nor_do_those_of_experts(layouts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    config = make_config(tmp_path)
    passed = check_reduction(config, layouts, processes=4, dtype="float32", pool=POOL)
    assert passed, capsys.readouterr().out
    assert max(POOL.run(4, threads, timeout=60)) < 100, "models that nobody holds are still there"


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_ranks_that_share_the_head_of_a_key(
    family: str, sequence_parallel: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two heads of keys, for four ranks; biases, or norms of queries and keys, are among what is compared."""
    save_tiny(tmp_path, family)
    config = make_config(tmp_path, parallel={"tp": 4, "sequence_parallel": sequence_parallel})
    passed = check_reduction(config, ["yours"], processes=4, dtype="float32", pool=POOL)
    assert passed, capsys.readouterr().out
