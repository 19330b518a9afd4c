"""Devices in a run on a GPU, seen on one that does not exist: which tensors lie where, and when the host waits.

Layers are torch's own. On one that exists, `test_gpu.py` runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss
from tests.helpers.fake_cuda import DeviceError, fake_gpu
from tests.helpers.gpu_steps import LENGTHS, POOL, Facts, devices_of, rank_on_a_gpu, steps, watch_inputs
from tests.helpers.models import make_config, save_qwen2


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):  # a real one would have a say
        yield
    POOL.close()


# --- where the host waits ---------------------------------------------------------------------------------------------

EACH = {
    # Of a micro-batch, before its pass: tokens, positions, rows, and the bounds of sequences among all slots and among
    # the rows; below, the columns of the scored slots. The attention of torch's layers reads the bounds and makes a
    # plan of three tensors.
    "actor.shard:make_shard send": 5,
    "actor.cpu.packing:_make_plan fetch": 1,
    "actor.cpu.packing:_make_plan send": 3,
}
LOGPROBS = {
    **EACH,
    "actor.shard:scored send": 8,
    "actor.actor:_whole fetch": 1,
}
UPDATE = {**EACH, "actor.shard:scored send": 9}
ONCE = {
    "logprobs": {"measures:reduce fetch": 1},
    "update": {
        # Megatron divides where there are tokens, and the divisor is checked.
        "actor.actor:_finalize read": 1,
        "actor.actor:gradient read": 1,
        # Sums, and maxima.
        "measures:reduce fetch": 2,
        "actor.optimizer:gradient_norm read": 1,
        # By kind: of the gradient, and of weights and update.
        "actor.norms:_norms fetch": 2,
        # Whether all ranks are well.
        "actor.actor:_agreed send": 1,
        "actor.actor:_agreed read": 1,
    },
}


def waits(each: dict[str, int], once: dict[str, int], micro_batches: int = len(LENGTHS)) -> Counter[str]:
    return Counter({where: micro_batches * count for where, count in each.items()}) + Counter(once)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_the_host_waits_for_micro_batches_and_updates_but_not_for_layers(
    dtype: str, depth: int, tmp_path: Path
) -> None:
    facts = steps(tmp_path, depth=depth, model={"dtype": dtype})
    assert facts.waits == {
        "away": Counter(),
        "logprobs": waits(LOGPROBS, ONCE["logprobs"]),
        "weighing": Counter(),
        "update": waits(UPDATE, ONCE["update"]),
        # A push knows by checksums which layers it can leave out: here, these and what is in none of them.
        "publish over gloo": Counter({"weights.checksum:read fetch": depth + 2, "weights.broadcast:finish fetch": 1}),
        "publish over nccl": Counter({"weights.checksum:read fetch": depth + 2}),
    }


# --- what lies where --------------------------------------------------------------------------------------------------

GPU, HOST = {"cuda:0"}, {"cpu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "truncated": {"algo": {"correction": {"kind": "truncated"}, "loss_scope": "prompt"}},
    "masked": {"algo": {"correction": {"kind": "masked", "level": "sequence"}, "loss_scope": "sample"}},
    "gspo": {"algo": {"loss": "gspo"}},
    "cispo": {"algo": {"loss": "cispo"}},
    "mlp again": {"memory": {"recompute": "selective"}},
    "attention again": {"memory": {"recompute": "selective", "recompute_modules": ["core_attn"]}},
    "a layer again": {"memory": {"recompute": "full", "recompute_layers": 1}},
    "all again": {"memory": {"recompute": "full"}},
    "plain optimizer": {"parallel": {"distributed_optimizer": False}},
}


def checkdevices_of(facts: Facts, *, leads: bool = True) -> None:
    assert facts.skipped is None
    assert facts.layers_get == GPU
    assert facts.state == dict.fromkeys(("parameters", "gradients", "moments", "gradients as weights"), GPU)
    # Log-probs come back to where weighing looks for them.
    assert facts.batches == HOST
    assert facts.buckets == ({"gloo": HOST, "nccl": GPU} if leads else {})


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_are_on_the_gpu_and_batches_on_the_host(name: str, tmp_path: Path) -> None:
    facts = steps(tmp_path, **VARIANTS[name])
    checkdevices_of(facts)
    assert facts.waits["update"] == waits(UPDATE, ONCE["update"])


def test_larger_passes_for_logprobs(tmp_path: Path) -> None:
    facts = steps(tmp_path, train={"mini_batch": 8, "micro_batch_tokens": 128, "logprob_tokens": 256})
    checkdevices_of(facts)
    assert facts.waits["logprobs"] == waits(LOGPROBS, ONCE["logprobs"], micro_batches=1)


def test_a_reference_comes_to_the_gpu_for_its_pass(tmp_path: Path) -> None:
    facts = steps(tmp_path, algo={"kl": {"coef": 0.1}}, memory={"offload_reference": True})
    checkdevices_of(facts)
    expected = waits(LOGPROBS | {"actor.shard:scored send": 9}, {"actor.offload:_wait synchronize": 2})
    assert facts.waits["reference"] == expected
    assert facts.waits["update"] == waits(UPDATE | {"actor.shard:scored send": 10}, ONCE["update"])


def test_what_is_offloaded_is_given_back_to_other_processes(tmp_path: Path) -> None:
    facts = steps(tmp_path, memory={"offload": ["optimizer", "gradients", "parameters"]})
    checkdevices_of(facts)
    assert facts.away == (0, 1)
    assert facts.waits["away"] == {"actor.offload:_wait synchronize": 6}
    held, emptied = steps(tmp_path).away
    assert held > 0 and emptied == 0


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 overlapping": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tp": 2},
    "tp2 and sp": {"tp": 2, "sequence_parallel": True},
    "cp2": {"cp": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path) -> None:
    facts = steps(tmp_path, ranks=2, rank=1, parallel=LAYOUTS[name])
    checkdevices_of(facts, leads=False)
    assert facts.waits["weighing"] == Counter()


@pytest.mark.parametrize("rank", [0, 1])
def test_stages_of_a_pipeline(rank: int, tmp_path: Path) -> None:
    path = save_qwen2(tmp_path)
    layers_get, batches = POOL.run(1, _stage, path, rank, timeout=100)[0]
    assert (layers_get, batches) == (GPU, HOST)


def _stage(path: Path, rank: int) -> tuple[set[str], set[str]]:
    """Take log-probs and a gradient. An update's measures come from the last stage, which the first does not have."""
    from transformers import AutoConfig

    sections: dict[str, Any] = {"parallel": {"pp": 2}, "model": {"layers": "torch", "dtype": "bfloat16"}}
    with rank_on_a_gpu(sections["parallel"], 2, rank) as (gpu, topo):
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        from dapo_megatron.actor.actor import Actor

        # Stages tell each other what comes, and the other one does not exist.
        batch = make_micro_batch([20, 4], seed=0)
        hf_config = AutoConfig.from_pretrained(path)
        communicate = P2PCommunicator._communicate_shapes

        def communicate_shapes(self: Any, *args: Any) -> list[Any]:
            return [shape and [batch.slots, 1, hf_config.hidden_size] for shape in communicate(self, *args)]

        layers_get: set[str] = set()
        with patch.object(P2PCommunicator, "_communicate_shapes", communicate_shapes):
            actor = Actor(make_config(path, **sections), topo, Unloaded(hf_config))
            watch_inputs(actor, layers_get)
            mini_batch = make_mini_batch([batch] * 2)
            gpu.count = mini_batch.loss_tokens
            (mini_batch,), _ = actor.with_old_logprobs([mini_batch])
            actor.gradient(mini_batch, ratio_loss)
        return layers_get, devices_of(mini_batch)


@dataclass(frozen=True)
class Unloaded:
    """A checkpoint that has a config only: each stage of a real one checks its names against those of the others."""

    hf_config: Any

    def load(self, chunks: Sequence[torch.nn.Module], together: Callable[[str], object]) -> None: ...


# --- what would fail on a GPU alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["numbers", "host"])
def test_measures_that_are_not_on_the_gpu_are_reduced_there(loss: str, tmp_path: Path) -> None:
    checkdevices_of(steps(tmp_path, loss=loss))


def test_a_skipped_mini_batch_can_be_kept(tmp_path: Path) -> None:
    facts = steps(tmp_path, loss="not finite")
    assert facts.skipped == "largest is inf"
    assert "rank0.micro_batch1.old_logprobs_T" in facts.saved


def test_peaks_are_compared_on_the_host() -> None:
    peaks = POOL.run(1, _peaks, timeout=100)[0]
    assert peaks == {"memory/update": 1.0, "memory/reserved": 2.0, "memory/device": 64.0}


def _peaks() -> dict[str, float]:
    with rank_on_a_gpu({}, 1, 0) as (_, topo):
        from dapo_megatron.obs.memory import PeakMemory

        memory = PeakMemory()
        with memory.phase("update"):
            pass
        return {name: measure.value for name, measure in memory.take(topo.max).items()}


# --- the GPU that does not exist --------------------------------------------------------------------------------------


def test_the_gpu_refuses_what_one_would() -> None:
    POOL.run(1, _refuses, timeout=100)


def _refuses() -> None:
    import torch.distributed as dist

    with rank_on_a_gpu({}, 1, 0) as (_, topo):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mixed in (lambda: there + here, lambda: there[torch.tensor([0])], lambda: torch.cat([here, there])):
            with pytest.raises(DeviceError, match=r"of shape \(.\d*,\), on the host"):
                mixed()
        assert (there + torch.ones(())).device == there.device  # a number, as far as CUDA is concerned
        with pytest.raises(DeviceError, match="over nccl has tensors on the host"):
            dist.all_reduce(here)
        with pytest.raises(DeviceError, match="over gloo has tensors on the GPU"):
            dist.all_reduce(there, group=topo.host_world)
        dist.all_reduce(there)
        dist.all_reduce(here, group=topo.host_world)


def test_the_gpu_sees_who_waits() -> None:
    kinds = POOL.run(1, _sees, timeout=100)[0]
    assert kinds == ["send", "read", "read", "fetch", "send", "fetch", "synchronize"]


def _sees() -> list[str]:
    with fake_gpu(count=7) as gpu:
        here, there = torch.arange(3), torch.ones(3, device="cuda", dtype=torch.int64)
        sent = here.to("cuda")
        assert int(sent[0] + there[0]) == gpu.count  # computed there: a stand-in
        assert bool(there.sum() > 0)
        assert sent.tolist() == [0, 1, 2]  # did not change there
        there.copy_(here)
        here.copy_(there)
        here.to("cuda", non_blocking=True)
        there.copy_(here, non_blocking=True)
        torch.cuda.synchronize()
        assert {wait.where for wait in gpu.waits} == {"check_reduction.pool:_call"}  # which has called this
        return [wait.kind for wait in gpu.waits]


def test_nothing_is_left_behind() -> None:
    POOL.run(1, _leaves_nothing, timeout=100)


def _leaves_nothing() -> None:
    def state() -> list[Any]:
        modules = (torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.distributed)
        return [
            *(dict(vars(module)) for module in modules),
            torch._C._len_torch_dispatch_stack(),
            torch.empty(2, device="meta").untyped_storage().device.type,
        ]

    with fake_gpu():  # for what torch imports meanwhile
        pass
    before = state()
    with fake_gpu():
        assert torch.ones(2, device="cuda").is_cuda and torch.cuda.is_available()
    assert state() == before
