"""What is computed under fake tensors and fake groups, against formulas written by hand and against real ranks.

H hidden size, F of the MLP, V vocabulary with its padding, Q and K channels of all queries and of all keys, T slots.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dapo_megatron import config_file
from dapo_megatron.check_reduction.pool import RankPool
from dapo_megatron.config import Config, MemoryConfig, ParallelConfig
from tests.helpers.checkpoint import TINY
from tests.helpers.fake_mesh import RankCost, fake_rank_cost, real_rank_cost
from tests.helpers.models import make_config
from tests.helpers.tracker import Collective, Tracker

GIB = 2**30
POOL = RankPool()
"""Apart from the other tests' ranks: these see no GPU."""

_COMMON = {"model_type": "qwen2", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "qwen2", **TINY, "tie_word_embeddings": False},
    "tiny-tied": {"model_type": "qwen2", **TINY},
    "larger": {
        "model_type": "qwen2",
        **TINY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "tie_word_embeddings": False,
    },
    "7B": {
        **_COMMON,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "32B": {
        **_COMMON,
        "hidden_size": 5_120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        yield
    POOL.close()


def tiny_config(parallel: dict[str, Any], dtype: str = "bfloat16", recompute: str = "none") -> Config:
    model, memory = {"dtype": dtype}, {"recompute": recompute}
    return make_config(Path("unused"), model=model, memory=memory, parallel=parallel, train={"mini_batch": 8})


def fake(size: str, config: Config, world_size: int, rank: int, lengths: tuple[int, ...], **more: int) -> RankCost:
    return POOL.run(1, _fake, SIZES[size], config, world_size, rank, lengths, more, timeout=200)[0]


def _fake(size: Any, config: Config, world: int, rank: int, lengths: Any, more: dict[str, int]) -> RankCost:
    return fake_rank_cost(size, config, world_size=world, rank=rank, lengths=lengths, **more)


def real(size: str, config: Config, world_size: int, lengths: tuple[int, ...], **more: int) -> list[RankCost]:
    return POOL.run(world_size, _real, SIZES[size], config, lengths, more, timeout=120)


def _real(size: Any, config: Config, lengths: Any, more: dict[str, int]) -> RankCost:
    from dapo_megatron.actor import topology

    topo = topology.initialize(config.parallel)
    cost = real_rank_cost(size, config, topo, lengths=lengths, **more)
    topology.shutdown()
    return cost


# --- by hand ----------------------------------------------------------------------------------------------------------


def matrices(size: dict[str, Any], parallel: ParallelConfig, rank_stage: int) -> tuple[int, int]:
    """Weights of this stage's matrix products on a tensor-parallel rank: of its layers, and of the output layer."""
    hidden, layers = size["hidden_size"], size["num_hidden_layers"] // parallel.pp
    queries = hidden
    keys = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * size["intermediate_size"]
    last = rank_stage == parallel.pp - 1
    return layers * layer // parallel.tp, vocabulary(size, parallel) * hidden * last


def vocabulary(size: dict[str, Any], parallel: ParallelConfig) -> int:
    """Rows of a tensor-parallel rank: a multiple of 16."""
    rows = -(-size["vocab_size"] // parallel.tp)
    return -(-rows // 16) * 16


def parameters(size: dict[str, Any], parallel: ParallelConfig, stage: int) -> int:
    hidden, layers = size["hidden_size"], size["num_hidden_layers"] // parallel.pp
    keys = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    biases_and_norms = layers * ((hidden + 2 * keys) // parallel.tp + 2 * hidden)
    embedding = vocabulary(size, parallel) * hidden * (stage == 0)
    final_norm = hidden * (stage == parallel.pp - 1)
    return sum(matrices(size, parallel, stage)) + biases_and_norms + embedding + final_norm


def check_formulas(size: str, config: Config, world_size: int, lengths: tuple[int, ...]) -> None:
    """Build the first and the last stage."""
    parallel = config.parallel
    data_ranks = world_size // (parallel.tp * parallel.pp)
    for stage in {0, parallel.pp - 1}:
        rank = 0 if stage == 0 else world_size - 1
        cost = fake(size, config, world_size, rank, lengths)
        count = parameters(SIZES[size], parallel, stage)
        assert cost.parameters == count
        # Megatron pads: every parameter to 64 numbers, and a bucket so that it divides over the replicas.
        assert 4 * count <= cost.gradient_bytes <= 4 * count * 1.001
        assert cost.parameter_bytes == cost.gradient_bytes // 2
        # A replica steps its part of every bucket, of which some is padding.
        share = cost.gradient_bytes // 4 / data_ranks
        assert 0.99 * share < cost.optimizer_bytes / 12 <= share
        held = cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes // 3
        assert cost.state_bytes == pytest.approx(held, rel=1e-3)
        in_layers, in_head = matrices(SIZES[size], parallel, stage)
        passes = 8 if config.memory.recompute == "full" else 6
        assert cost.flops == (passes * in_layers + 6 * in_head) * sum(lengths) // parallel.cp


def gpu_config(**parallel: Any) -> Config:
    return config_file.parse(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "parallel": {"sequence_parallel": True, **parallel},
            "rollout": {"prompts": 512, "responses": 16},
            "train": {"micro_batch_tokens": 32_768},
        }
    )


def test_7b() -> None:
    check_formulas("7B", gpu_config(tp=4, pp=4), 32, (4_096,) * 2)


@pytest.mark.slow
def test_32b() -> None:
    check_formulas("32B", gpu_config(tp=8, pp=2), 128, (4_096,) * 2)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_of_a_gpu_size(path: Path) -> None:
    config = config_file.load(path)
    size = next((size for size in ("7B", "32B") if f"-{size}".lower() in str(config.model.path).lower()), None)
    if size is None:
        pytest.skip(f"{config.model.path} is not of a size that is known here")
    slots = config.train.micro_batch_tokens // 2
    check_formulas(size, config, 2 * config.parallel.model_size, (slots, slots))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_32b_at_tp8_with_32k_tokens(recompute: str) -> None:
    config = gpu_config(tp=8)
    config = config.model_copy(update={"memory": MemoryConfig.model_validate({"recompute": recompute})})
    check_formulas("32B", config, 128, (4_096,) * 8)
    cost = fake("32B", config, 128, 0, (4_096,) * 8)
    hidden, width, layers, slots = 5_120, 27_648, 64, 32_768
    if recompute == "full":
        # Inputs of all layers, a part of the slots each, and the logits.
        kept = layers * slots // 8 * hidden * 2 + slots * 152_064 // 8 * 2
        assert kept < cost.activation_bytes < 1.6 * kept
    else:
        # Both halves of SwiGLU's input, silu, the other half plus 0, and the product: five tensors of [t, F / 8].
        mlp = layers * slots * 5 * width // 8 * 2
        assert mlp < cost.activation_bytes < 2 * mlp


# --- collectives ------------------------------------------------------------------------------------------------------

SLOTS, HIDDEN, LAYERS = (64, 64), 32, 2
WHOLE = sum(SLOTS) * HIDDEN * 2
"""Bytes of the activations of all slots between two layers."""
TP, CP, PP, DP = (f"{name}_PARALLEL_GROUP" for name in ("TENSOR_MODEL", "CONTEXT", "PIPELINE_MODEL", "DATA"))
DP_CP = f"{DP}_WITH_CP"


def counted(cost: RankCost) -> dict[tuple[str, str, int], int]:
    """(kind, group, bytes) -> calls, of groups of more than one rank."""
    return dict(Counter((one.kind, one.group, one.bytes) for one in cost.collectives if len(one.ranks) > 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives_of_sequence_parallel(rank: int) -> None:
    cost = fake("tiny", tiny_config({"tp": 2, "sequence_parallel": True}), 2, rank, SLOTS)
    assert {one.ranks for one in cost.collectives if one.group == TP} == {(0, 1)}
    assert counted(cost) == {
        # Forward, before both halves of each layer and before the output layer. Backward, each of them again for the
        # gradient of the weight, but not for the output layer; once more in each half for the gradient of what was
        # scattered, and for that of the embedding.
        ("_allgather_base", TP, WHOLE): (2 * LAYERS + 1) + 2 * LAYERS + (2 * LAYERS + 1),
        # Forward, after the embedding and both halves of each layer; backward, before both halves.
        ("_reduce_scatter_base", TP, WHOLE): (2 * LAYERS + 1) + 2 * LAYERS,
        # The gradient of the output layer's input.
        ("allreduce", TP, WHOLE): 1,
        # Log-probs: the maximum, float32; three sums, float64.
        ("allreduce", TP, sum(SLOTS) * 4): 1,
        ("allreduce", TP, sum(SLOTS) * 3 * 8): 1,
        # Gradients of the norms, each from this rank's slots, float32.
        ("allreduce", TP, (2 * LAYERS + 1) * HIDDEN * 4): 1,
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives_of_context_parallel(rank: int) -> None:
    cost = fake("tiny", tiny_config({"cp": 2}), 2, rank, SLOTS)
    keys_and_values = sum(SLOTS) * 2 * (HIDDEN // 4 * 2) * 2
    calls = counted(cost)
    assert calls.pop(("_allgather_base", CP, keys_and_values)) == LAYERS
    assert calls.pop(("_reduce_scatter_base", CP, keys_and_values)) == LAYERS
    # Both ranks have parts of the same sequences: gradients and counts are summed as over replicas.
    assert calls == over_replicas(cost)


def over_replicas(cost: RankCost) -> dict[tuple[str, str, int], int]:
    return {
        ("reduce_scatter_tensor_coalesced", DP_CP, cost.gradient_bytes): 1,
        # The count of tokens, int32.
        ("allreduce", DP_CP, 4): 1,
        # Measures: six means with their counts and a maximum, float64.
        ("allreduce", DP_CP, 6 * 2 * 8): 1,
        ("allreduce", DP_CP, 8): 1,
    }


def test_collectives_of_data_parallel() -> None:
    cost = fake("tiny", tiny_config({}), 2, 1, SLOTS)
    assert counted(cost) == over_replicas(cost)
    plain = fake("tiny", tiny_config({"distributed_optimizer": False}), 2, 1, SLOTS)
    gradients = [one for one in plain.collectives if one.bytes == plain.gradient_bytes]
    assert [(one.kind, one.ranks) for one in gradients] == [("allreduce_coalesced", (0, 1))]


def test_collectives_of_a_pipeline() -> None:
    config = tiny_config({"pp": 2})
    first, last = (fake("tiny", config, 2, rank, SLOTS) for rank in range(2))

    def sent(cost: RankCost) -> list[tuple[str, int]]:
        return [(one.kind, one.bytes) for one in cost.collectives if one.kind in ("send", "recv")]

    # The shape goes before the tensor: three int64.
    assert sent(first) == [("send", 24), ("send", WHOLE), ("recv", 24), ("recv", WHOLE)]
    assert sent(last) == [("recv", 24), ("recv", WHOLE), ("send", 24), ("send", WHOLE)]
    for cost in (first, last):
        rest = [one for one in cost.collectives if len(one.ranks) > 1 and one.kind not in ("send", "recv")]
        assert {(one.kind, one.group, one.ranks) for one in rest} == {("broadcast", PP, (0, 1))}
        # The count of tokens, int32, and the measures, pickled: their length, then they.
        assert [one.bytes for one in rest][:2] == [4, 8]
        assert len(rest) == 3


def test_a_mesh_of_all_kinds() -> None:
    config = tiny_config({"tp": 2, "cp": 2, "pp": 2, "sequence_parallel": True})
    cost = fake("tiny", config, 16, 13, SLOTS)
    # Ranks count tp first, then cp, dp and pp.
    assert {one.group: one.ranks for one in cost.collectives} == {
        TP: (12, 13),
        CP: (13, 15),
        DP_CP: (9, 11, 13, 15),
        PP: (5, 13),
    }


# --- real ranks -------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True}),
    "dp2-plain": (2, {"distributed_optimizer": False}),
}


def without_pickles(cost: RankCost) -> list[Collective]:
    """All but the measures that the last stage broadcasts, whose pickled size depends on their values."""
    if not any(one.kind in ("send", "recv") for one in cost.collectives):
        return list(cost.collectives)
    *collectives, length, _ = cost.collectives
    assert (length.kind, length.bytes) == ("broadcast", 8)
    return collectives


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ["tiny", "tiny-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_ranks_do_the_same(size: str, layout: str, dtype: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    config, lengths = tiny_config(parallel, dtype), (64, 24, 60, 1)
    for rank, cost in enumerate(real(size, config, world_size, lengths, micro_batches=3)):
        expected = fake(size, config, world_size, rank, lengths, micro_batches=3)
        # Equal to the byte, except where a thread of gloo lets go of a tensor late: the largest is 2.3% of activations.
        assert expected.activation_bytes == pytest.approx(cost.activation_bytes, rel=0.05)
        assert expected.state_bytes == pytest.approx(cost.state_bytes, rel=0.001)
        assert expected.flops == cost.flops
        assert without_pickles(expected) == without_pickles(cost)


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_real_peak_of_a_larger_model(recompute: str) -> None:
    config, lengths = tiny_config({}, recompute=recompute), (700, 600)
    (cost,) = real("larger", config, 1, lengths)
    expected = fake("larger", config, 1, 0, lengths)
    assert expected.activation_bytes == pytest.approx(cost.activation_bytes, rel=0.005)


@pytest.mark.multiproc
@pytest.mark.slow
def test_real_ranks_of_a_virtual_pipeline_do_the_same() -> None:
    config, lengths = tiny_config({"pp": 2, "vpp": 3}), (64, 24, 60, 1)
    for rank, cost in enumerate(real("larger", config, 2, lengths, micro_batches=4)):
        expected = fake("larger", config, 2, rank, lengths, micro_batches=4)
        assert expected.activation_bytes == pytest.approx(cost.activation_bytes, rel=0.05)
        assert without_pickles(expected) == without_pickles(cost)


# --- the tracker, and what is left behind -----------------------------------------------------------------------------


def test_tracker_counts_storages_once_and_to_their_end() -> None:
    with Tracker(number=1) as tracker:
        x = torch.ones(1_000)
        view = x[10:]
        y = x @ torch.ones(1_000, 50)
        assert tracker.live == 4 * (1_000 + 50)
        assert tracker.peak == 4 * (1_000 + 50_000 + 50)
        del x
        assert tracker.live == 4 * (1_000 + 50)
        del view
        assert tracker.live == 4 * 50
        tracker.restart()
        (y[None] @ torch.ones(50, 3)).sum()
    assert tracker.flops == 2 * 50 * 3


def test_recompute_costs_another_forward_pass_and_saves_memory() -> None:
    none, full = (fake("tiny", tiny_config({}, recompute=choice), 1, 0, SLOTS) for choice in ("none", "full"))
    in_layers, in_head = matrices(SIZES["tiny"], ParallelConfig(), 0)
    assert none.flops == 6 * (in_layers + in_head) * sum(SLOTS)
    assert full.flops == none.flops + 2 * in_layers * sum(SLOTS)
    assert full.activation_bytes < none.activation_bytes


def test_a_stage_keeps_as_many_micro_batches_as_come_before_the_first_gradient() -> None:
    config = tiny_config({"pp": 2})
    first, last = (
        [fake("tiny", config, 2, rank, SLOTS, micro_batches=count).activation_bytes for count in (1, 2, 4)]
        for rank in range(2)
    )
    # Every micro-batch brings its own tokens and masks, which are not small against activations of this size.
    assert first[1] > 1.7 * first[0]
    assert first[2] < 1.2 * first[1]
    assert last[2] < 1.2 * last[0]


def test_nothing_is_left_behind() -> None:
    POOL.run(1, _leaves_nothing, timeout=60)


def _leaves_nothing() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from dapo_megatron.actor import actor
    from dapo_megatron.actor.cpu import packing
    from dapo_megatron.errors import ConfigError

    def state() -> list[Any]:
        names = ("init_process_group", "new_group", "all_gather_object", "broadcast_object_list")
        return [
            dict(os.environ),
            *(getattr(dist, name) for name in names),
            actor.make_shard,
            packing._make_plan,
            P2PCommunicator._communicate_shapes,
            torch.nn.Module.bfloat16,
            torch.get_rng_state().tolist(),
            dist.is_initialized(),
            parallel_state.is_initialized(),
            torch._C._len_torch_dispatch_stack(),
        ]

    before = state()
    _fake(SIZES["tiny"], tiny_config({"pp": 2}), 2, 1, SLOTS, {})
    assert state() == before
    with pytest.raises(ConfigError, match="does not divide the model's num_key_value_heads"):
        _fake(SIZES["tiny"], tiny_config({"tp": 4}), 4, 0, SLOTS, {})
    assert state() == before
    assert torch.ones(2).tolist() == [1.0, 1.0]
